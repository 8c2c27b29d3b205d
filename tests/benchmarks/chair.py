"""How much faster CHAIR is than the published algorithm, on real captions, with equal output.

What it is: the algorithm of Rohrbach et al.'s script and its ports, written down again with the
costs that it has there (NLTK's tokenizer and a walk over all singularisation rules for every
token, the vocabulary's set built twice per token, nothing remembered), against `chair.score` in
the same process. What it is not: a parity test; those are in tests/metrics/test_chair.py.

    FIRSTHAND_REFERENCE=... python tests/benchmarks/chair.py [--quick]

Times are CPU seconds of one core. `cold`: ours starts with an empty memory and builds its tables;
`warm`: it has seen the captions. `ground_truth`: objects from a captions file of COCO's size
(616,767; --quick: a 20th), synthesised of windows of the real captions; theirs is extrapolated
from 1,000 of its captions.
"""

import argparse
import gc
import gzip
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import nltk
from nltk.tokenize import NLTKWordTokenizer
from textblob.en.inflect import singularize

from firsthand.metrics import chair
from firsthand.metrics.chair import coco

NAMES = ("Instruction1_llava", "Instruction1_minigpt-4", "Instruction2_llava")
N_CAPTIONS, N_IMAGES = 616_767, 123_287
ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()


class Published:
    """The published algorithm, step by step, with its costs."""

    def __init__(self) -> None:
        rows = [[c, *terms] for c, terms in coco.CATEGORIES.items()]
        dead = coco.NEVER_FOUND  # in the published list they are misspelt or out of reach
        self.objects = [term for row in rows for term in row if term not in dead]
        self.node_of = {term: row[0] for row in rows for term in row if term not in dead}
        doubles = [t for t in self.objects if " " in t and t not in coco.NEVER_JOINED]
        self.doubles = {double: double for double in doubles}
        self.doubles |= {"motor bike": "motor bike", "home plate": "home plate"}
        self.doubles |= {"train track": "train track", "bow tie": "tie", "wine glas": "wine glass"}
        self.doubles |= {"toilet seat": "toilet"}
        for animal in ANIMALS:
            self.doubles |= {f"baby {animal}": animal, f"adult {animal}": animal}
        self.doubles |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
        self.tokenize, self.tokenizer = _tokenizer()

    def words(self, caption: str) -> tuple[list[str], list[str], list[int], list[str]]:
        """The terms that the caption mentions, their nodes, their indices, and all its words."""
        tokens = [singularize(token) for token in self.tokenize(caption.lower())]
        merged, places, i = [], [], 0
        while i < len(tokens):
            places.append(i)
            double = " ".join(tokens[i : i + 2])
            if double in self.doubles:
                merged.append(self.doubles[double])
                i += 2
            else:
                merged.append(tokens[i])
                i += 1
        if "toilet" in merged and "seat" in merged:
            merged = [word for word in merged if word != "seat"]
        places = [places[i] for i, word in enumerate(merged) if word in set(self.objects)]
        words = [word for word in merged if word in set(self.objects)]
        return words, [self.node_of[word] for word in words], places, merged

    def score(self, rows: list[dict], objects: dict) -> tuple[dict, list[dict]]:
        """The figures, and a record of every caption."""
        captions = mentions = false = false_captions = right = shown = 0
        records = []
        for row in rows:
            words, nodes, places, merged = self.words(row["prediction"])
            truth = set(objects[row["image_id"]])
            record = {"image_id": row["image_id"], "caption": row["prediction"], "words": merged}
            record |= {"nodes": nodes, "truth": list(truth), "false": [], "false_at": []}
            found = set()
            for word, node, place in zip(words, nodes, places, strict=True):
                if node in truth:
                    found.add(node)
                else:
                    record["false"].append((word, node))
                    record["false_at"].append(place)
            captions, mentions = captions + 1, mentions + len(nodes)
            false, false_captions = (
                false + len(record["false"]),
                false_captions + bool(record["false"]),
            )
            right, shown = right + len(found), shown + len(truth)
            records.append(record)
        figures = {"chair_s": false_captions / captions, "chair_i": false / mentions}
        return figures | {"recall": right / shown}, records


def _tokenizer():
    """NLTK's word tokenizer; where Punkt's data is absent, its Treebank part by sentence."""
    try:
        nltk.word_tokenize("A dog. A cat.")
    except LookupError:
        treebank = NLTKWordTokenizer()

        def by_sentence(text: str) -> list[str]:
            sentences = nltk.regexp_tokenize(text, r"[^.!?]+[.!?]*[\"')\]]*\s*|[.!?]+")
            return [token for sentence in sentences for token in treebank.tokenize(sentence)]

        return by_sentence, "NLTK's Treebank tokenizer by sentence (no Punkt data here)"
    return nltk.word_tokenize, "nltk.word_tokenize"


def read_captions() -> tuple[list[dict], dict]:
    """The reference captions as prediction rows, and their images' objects."""
    folder = Path(os.environ.get("FIRSTHAND_REFERENCE", "(not set)")) / "chair"
    if not folder.is_dir():
        raise SystemExit("FIRSTHAND_REFERENCE must name the folder of the reference captions.")
    rows, objects = [], {}
    for name in NAMES:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                objects[row["image_id"]] = row["objects"]
                rows.append({"id": len(rows), "image_id": row["image_id"]})
                rows[-1]["prediction"] = row["caption"]
    return rows, objects


def seconds(call) -> tuple[float, object]:
    """CPU time of a call, and what it returns; objects of before cost the collector nothing."""
    gc.collect()
    gc.freeze()
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def measure_captions(published: Published) -> list[dict]:
    """The figures `cold` and `warm`."""
    rows, objects = read_captions()
    theirs, (figures, records) = seconds(lambda: published.score(rows, objects))
    print(f"{len(rows)} captions, {published.tokenizer}: {1000 * theirs / len(rows):.2f} ms each")
    nodes = [record["nodes"] for record in records]
    false = [[node not in record["truth"] for node in record["nodes"]] for record in records]
    cold, warm, agree = [], [], True
    for _ in range(5):
        made, lexicon = seconds(coco.original)
        first, result = seconds(lambda used=lexicon: chair.score(rows, objects, used, True))
        again, repeated = seconds(lambda used=lexicon: chair.score(rows, objects, used, True))
        cold.append(made + first)
        warm.append(again)
        for found in (result, repeated):
            agree &= nodes == [caption["nodes"] for caption in found["captions"]]
            agree &= false == [caption["hallucinated"] for caption in found["captions"]]
            agree &= figures == {name: found[name] for name in figures}
    return [
        figure("cold", statistics.median(cold), theirs, agree),
        figure("warm", statistics.median(warm), theirs, agree),
    ]


def write_coco(folder: Path, n_captions: int) -> tuple[Path, Path]:
    """Annotation files like COCO's: short captions, now and then with a word of their own."""
    rng = random.Random(0)
    texts = [row["prediction"].split() for row in read_captions()[0]]
    annotations = []
    for number in range(n_captions):
        words = rng.choice(texts)
        start = rng.randrange(max(1, len(words) - 12))
        caption = " ".join(words[start : start + rng.randint(8, 13)])
        if number % 10 == 0:
            caption += f" near word{number}s."
        image = number % max(1, n_captions * N_IMAGES // N_CAPTIONS)
        annotations.append({"image_id": image, "id": number, "caption": caption})
    images = [{"id": image} for image in {a["image_id"] for a in annotations}]
    categories = [{"id": i, "name": name} for i, name in enumerate(coco.CATEGORIES)]
    things = [{"image_id": image["id"], "category_id": image["id"] % 80} for image in images]
    files = (folder / "instances.json", folder / "captions.json")
    contents = (
        {"images": images, "annotations": things, "categories": categories},
        {"images": images, "annotations": annotations},
    )
    for path, content in zip(files, contents, strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    return files


def measure_truth(published: Published, quick: bool) -> list[dict]:
    """The figure `ground_truth`."""
    n_captions = N_CAPTIONS // 20 if quick else N_CAPTIONS
    with tempfile.TemporaryDirectory() as folder:
        instances, captions = write_coco(Path(folder), n_captions)
        lexicon = coco.original()
        ours, objects = seconds(lambda: chair.objects_from_coco(instances, captions, lexicon))
        content = json.loads(captions.read_text(encoding="utf-8"))["annotations"]
    sample = random.Random(1).sample(content, 1000)
    spent, nodes = seconds(lambda: [published.words(a["caption"])[1] for a in sample])
    pairs = list(zip(sample, nodes, strict=True))
    agree = all(set(found) <= set(objects[a["image_id"]]) for a, found in pairs)
    agree &= all(found == [m.node for m in lexicon.mentions(a["caption"])] for a, found in pairs)
    print(f"ground truth of {n_captions} captions{', a 20th of COCO' if quick else ''}")
    return [figure("ground_truth", ours, spent / len(sample) * n_captions, agree)]


def figure(name: str, ours: float, theirs: float, agree: bool) -> dict:
    """One line of the report."""
    numbers = {"ratio": theirs / ours, "ours": ours, "theirs": theirs}
    rounded = {key: round(value, 4) for key, value in numbers.items()}
    return {"name": name, **rounded, "unit": "s", "agree": bool(agree)}


def main() -> None:
    """Measure, and print one JSON object per figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ground truth of a 20th of COCO")
    args = parser.parse_args()
    published = Published()
    figures = measure_captions(published) + measure_truth(published, args.quick)
    for one in figures:
        print(json.dumps(one))


if __name__ == "__main__":
    main()
