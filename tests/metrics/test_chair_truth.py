"""Ground truth from COCO's files and from files of one's own, and what is refused."""

import gzip
import json

import pytest

from firsthand.metrics.chair import scoring as chair

INSTANCES = {
    "images": [{"id": 1}, {"id": 2}, {"id": 3}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 63, "name": "couch"}],
    "annotations": [
        {"image_id": 1, "category_id": 18, "iscrowd": 0},
        {"image_id": 1, "category_id": 18, "iscrowd": 1},
        {"image_id": 2, "category_id": 63},
    ],
}
CAPTIONS = {
    "images": [{"id": 1}, {"id": 2}, {"id": 3}],
    "annotations": [
        {"image_id": 1, "id": 7, "caption": "A puppy and two men on a bus"},
        {"image_id": 1, "id": 8, "caption": "Vases"},
        {"image_id": 2, "id": 9, "caption": "Nothing to see"},
    ],
}


def write(path, content, zipped=False):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "i.json", INSTANCES), write(tmp_path / "c.json", CAPTIONS)


def test_objects_are_those_of_instances_and_captions(files):
    assert chair.objects_from_coco(*files) == {1: ["dog", "person", "vase"], 2: ["couch"], 3: []}


def test_captions_are_read_as_the_variant_reads_them(files):
    instances, captions = files
    assert chair.objects_from_coco(instances, captions, variant="sima")[1] == ["bus", "dog"]
    fixed = chair.objects_from_coco(str(instances), [str(captions)], variant="fixed")
    assert fixed[1] == ["bus", "dog", "person", "vase"]


def test_instances_alone_and_several_files(tmp_path, files):
    assert chair.objects_from_coco(files[0]) == {1: ["dog"], 2: ["couch"], 3: []}
    more = INSTANCES | {"images": [{"id": 4}]}
    more["annotations"] = [{"image_id": 4, "category_id": 63}]
    both = chair.objects_from_coco([files[0], write(tmp_path / "more.json", more)])
    assert both == {1: ["dog"], 2: ["couch"], 3: [], 4: ["couch"]}


def test_gzipped_files_are_read_whatever_their_name(tmp_path, files):
    zipped = [
        write(tmp_path / "i.json.gz", INSTANCES, zipped=True),
        write(tmp_path / "captions", CAPTIONS, zipped=True),
    ]
    assert chair.objects_from_coco(*zipped) == chair.objects_from_coco(*files)


def test_truth_goes_into_the_score(files):
    rows = [{"id": "a", "image_id": 1, "prediction": "A dog and a cat"}]
    rows += [{"id": "b", "image_id": 3, "prediction": "A dog"}]
    result = chair.score(rows, chair.objects_from_coco(*files))
    assert (result["n_hallucinated"], result["n_objects"]) == (2, 3)


def test_other_label_sets_bring_their_lexicon(tmp_path):
    violins = INSTANCES | {"categories": [{"id": 18, "name": "Violin"}, {"id": 63, "name": "oboe"}]}
    path = write(tmp_path / "i.json", violins)
    lexicon = chair.lexicon_from_nouns(["violin", "oboe"])
    assert chair.objects_from_coco(path, lexicon=lexicon)[1] == ["violin"]
    with pytest.raises(ValueError, match=r"i\.json: 'Violin' is no object of the lexicon 'orig"):
        chair.objects_from_coco(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "is no JSON, or not whole"),
        (gzip.compress(json.dumps(INSTANCES).encode(), mtime=0)[:40], "is no JSON, or not whole"),
        ([1, 2, 3], "holds a list of 3: a COCO file of this kind has lists named annotations and"),
        ({"a": 1, "b": 2}, "an object with the keys a, b.*no annotations"),
        (CAPTIONS, "keys annotations, images.*no categories.*swapped"),
        (INSTANCES | {"annotations": {}}, "no annotations"),
        (INSTANCES | {"categories": ["dog"]}, "categories are not all like"),
        (
            INSTANCES | {"annotations": [{"image_id": 1}]},
            "annotation 0 is .*keys image_id; it needs",
        ),
        (INSTANCES | {"annotations": [7]}, "annotation 0 is 7; it needs"),
        (
            INSTANCES | {"annotations": [{"image_id": 1, "category_id": 99}]},
            "do not list the category 99",
        ),
    ],
)
def test_files_that_are_not_instances_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        chair.objects_from_coco(write(tmp_path / "i.json", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            INSTANCES,
            "annotation 0 .*needs image_id and caption. Are instances and captions swapped",
        ),
        ({"annotations": [{"image_id": 5, "caption": None}]}, "image 5 is a NoneType, no text"),
        ({"images": []}, "no annotations"),
    ],
)
def test_files_that_are_not_captions_are_refused(tmp_path, files, content, message):
    with pytest.raises(ValueError, match=message):
        chair.objects_from_coco(files[0], write(tmp_path / "c.json", content))


def test_objects_of_ones_own(tmp_path):
    own = {"1": ["dog"], "b": []}
    assert chair.read_objects(write(tmp_path / "o.json", own)) == own
    assert chair.read_objects(write(tmp_path / "o.json.gz", own, zipped=True)) == own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (INSTANCES, "is a COCO annotation file.*objects_from_coco"),
        ([["dog"]], "holds a list of 1, not"),
        ({"1": "dog"}, "image '1' has 'dog', no list of names"),
        ({"1": [3]}, "image '1' has a list of 1, no list of names"),
        (b"", "is no JSON"),
    ],
)
def test_other_objects_files_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        chair.read_objects(write(tmp_path / "o.json", content))
