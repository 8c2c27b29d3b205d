"""The command line: `firsthand <verb>`; parsers stand here and in cli_lrv.py and cli_steer.py, and
every handler is imported late.

What it is: argparse and one dispatch. What it is not: a place for work; verbs live in the module
that their parser names.

    firsthand --help
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import Any

from firsthand.recipes import cli_lrv, cli_steer

EXPECTED = (ValueError, OSError, ImportError)  # the user's input or machine, not our bug


def _common_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="Hub id or path; the demo model if absent")


def _demo(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("demo", help="answer, measure, explain, steer and measure again")
    parser.add_argument("--out", default="firsthand-demo", help="folder for results and report")
    _common_model(parser)
    parser.add_argument("--images", help="a folder of your images, explained beside the scenes")
    parser.add_argument("--question", default="Describe the image.", help="asked about --images")
    parser.add_argument("--scenes", type=int, default=32, help="scenes of each test split")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(module="demo")


def _env(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("env", help="what is installed here, for bug reports")
    parser.set_defaults(module="env")


def _measure_reliance(metrics: argparse._SubParsersAction) -> argparse.ArgumentParser:
    reliance = metrics.add_parser(
        "visual-reliance",
        help="drop without key regions: asks about --data, or scores rows with `condition`",
    )
    reliance.add_argument(
        "--data", help="grounded samples: Parquet or Hub id; `scenes` are the demo's"
    )
    _common_model(reliance)
    reliance.add_argument("--count", type=int, help="scenes or samples; all if absent")
    reliance.add_argument("--answers", help="JSON {id: [accepted answer, ...]}, scored as VQA does")
    reliance.add_argument("--region", default="bbox", choices=("bbox", "mask"))
    reliance.add_argument("--fill", default="mean", choices=("mean", "black", "noise", "blur"))
    reliance.add_argument("--seed", type=int, default=0, help="of noise and of the control's place")
    reliance.add_argument("--max-new-tokens", type=int, default=16)
    reliance.add_argument("--batch-size", type=int, default=8)
    return reliance


def _measure_key_expressions(metrics: argparse._SubParsersAction) -> None:
    parser = metrics.add_parser(
        "key-expressions", help="a judge's view of expressions and masks (FiVL's evaluation)"
    )
    parser.add_argument("--data", required=True, help="grounded samples; `scenes` are the demo's")
    parser.add_argument("--split", default="train", help="of the Hub's data set or the scenes")
    parser.add_argument("--count", type=int, help="samples; all if absent")
    parser.add_argument("--endpoint", required=True, help="base URL of an OpenAI-compatible server")
    parser.add_argument("--judge", required=True, help="the model's name there")
    parser.add_argument("--out", required=True, help="write result rows to this JSON file")
    parser.add_argument("--details", help="write every reply to this JSONL file")
    parser.add_argument("--cache", help="folder of answered requests; beside --out if absent")
    parser.set_defaults(module="measure_key_expressions")


COMPARED = ("chair", "pope", "amber", "mementos", "mmhal", "gqa", "gavie", "visual-reliance")


def _measured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", help="write result rows to this JSON file")
    parser.add_argument("--split", default="all", help="name of the split")


def _answered_by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--decoding", default="as given", help="of the answers, for the protocol")
    parser.add_argument("--max-new-tokens", type=int, help="of the answers, for the protocol")
    parser.add_argument(
        "--skip-bad", action="store_true", help="count rows that cannot be scored, and go on"
    )


def _chair_truth(parser: argparse.ArgumentParser) -> Any:
    chair = parser.add_argument_group("chair")
    chair.add_argument("--objects", help="ground truth: JSON {image_id: [object, ...]}")
    chair.add_argument("--coco-instances", nargs="+", metavar="FILE", help="or instances_*.json")
    chair.add_argument("--coco-captions", nargs="+", metavar="FILE", help="with captions_*.json")
    chair.add_argument(
        "--variant",
        default="original",
        choices=("original", "opera", "sima", "objhal", "fixed"),
        help="whose CHAIR: published implementations do not agree",
    )
    chair.add_argument("--nouns", help="text file of nouns, one a line, instead of COCO's lexicon")
    return chair


def _chair_options(parser: argparse.ArgumentParser) -> None:
    chair = _chair_truth(parser)
    chair.add_argument("--at-words", type=int, metavar="N", help="of the first N words a caption")
    chair.add_argument(
        "--at-recall", type=float, metavar="R", help="of captions cut alike to where R is reached"
    )


def _pope_options(parser: argparse.ArgumentParser) -> None:
    pope = parser.add_argument_group("pope")
    pope.add_argument("--questions", help="POPE's published file, where rows lack `answer`")
    pope.add_argument(
        "--parser",
        default="strict",
        choices=("strict", "pope", "opera", "lmms_eval", "exact", "vcd"),
        help="how an answer is read; the others are as published",
    )


def _amber_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("amber").add_argument(
        "--amber-data", help="AMBER's folder `data`: annotations, relation and safe words"
    )


def _mementos_options(parser: argparse.ArgumentParser) -> None:
    mementos = parser.add_argument_group("mementos")
    mementos.add_argument("--references", help="JSON {image_id: description, or lists of keywords}")
    mementos.add_argument(
        "--keywords", help='JSON {"objects": [[term, synonym, ...], ...], "behaviours": [...]}'
    )


def _judge_options(parser: argparse.ArgumentParser) -> None:
    judge = parser.add_argument_group("judge, of mmhal, gqa and gavie")
    judge.add_argument("--endpoint", help="the judge's URL; its key is read from OPENAI_API_KEY")
    judge.add_argument("--judge-model", help="the name that the endpoint knows the judge by")
    judge.add_argument("--cache", help="folder of answered requests; beside --out if absent")
    judge.add_argument("--concurrency", type=int, default=8, help="requests under way at once")
    judge.add_argument("--timeout", type=float, default=60.0, help="seconds for an answer")
    judge.add_argument(
        "--price",
        nargs=2,
        type=float,
        default=(0.0, 0.0),
        metavar=("PROMPT", "COMPLETION"),
        help="US dollars per million tokens",
    )


def _gavie_options(parser: argparse.ArgumentParser) -> None:
    gavie = parser.add_argument_group("gavie")
    gavie.add_argument(
        "--regions", help="dense captions: vg_annotation.json, region_descriptions.json or `scenes`"
    )
    gavie.add_argument("--offline", action="store_true", help="marks by rule, for --regions scenes")
    gavie.add_argument("--samples", type=int, default=1, help="times that each answer is judged")
    gavie.add_argument(
        "--bbox-format",
        default="fixed",
        choices=("fixed", "legacy"),
        help="legacy: widths in place of heights, as published",
    )


def _measure_gavie(metrics: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = metrics.add_parser("gavie", help="a judge's marks for relevance and accuracy, 0 to 10")
    parser.add_argument(
        "--mode",
        default="single",
        choices=("single", "joint"),
        help="joint: answers of all files in one prompt, as published",
    )
    parser.add_argument("--others", nargs="+", metavar="FILE", help="other models', for joint")
    parser.add_argument("--seed", type=int, default=0, help="of the answers' order in joint mode")
    return parser


def _measure_compare(metrics: argparse._SubParsersAction) -> None:
    parser = metrics.add_parser(
        "compare", help="the paired difference of two files of predictions, with its interval"
    )
    parser.add_argument("a", help="prediction rows, .jsonl or .jsonl.gz")
    parser.add_argument("b", help="the other answers to the same questions")
    parser.add_argument("--metric", dest="compared", required=True, choices=COMPARED)
    parser.add_argument("--common", action="store_true", help="only the ids that both have")
    parser.add_argument("--arms", nargs=2, metavar=("A", "B"), help="names; the files' if absent")
    _measured(parser)
    _answered_by(parser)
    _chair_options(parser)
    _pope_options(parser)
    _amber_options(parser)
    _mementos_options(parser)
    _judge_options(parser)
    _gavie_options(parser)
    parser.set_defaults(module="measure_compare", data=None)


def _measure_export(metrics: argparse._SubParsersAction) -> None:
    parser = metrics.add_parser("export", help="result rows as Hub Eval Results for a model's page")
    parser.add_argument("results", help="what --out of a measure wrote")
    parser.add_argument("--dataset-id", required=True, help="the benchmark's Hub id, org/data")
    parser.add_argument(
        "--task-id", required=True, help="the task there; {metric} and {split} are filled in"
    )
    parser.add_argument("--out", required=True, help="a file .eval_results/NAME.yaml")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--arm", help="whose results, where the file has several arms")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--source-url", help="link to the evaluation")
    parser.add_argument("--model-card", help="also add them to this README.md's model-index")
    parser.set_defaults(module="measure_export")


def _measure_lmms_eval(metrics: argparse._SubParsersAction) -> None:
    parser = metrics.add_parser("lmms-eval", help="lmms-eval's tasks (MME, GQA, ...) on a model")
    parser.add_argument("--tasks", required=True, help="names of lmms-eval's, by commas")
    parser.add_argument("--include-path", help="a folder with tasks of your own")
    _common_model(parser)
    parser.add_argument("--vector", help="folder or Hub id of a steering vector to attach")
    parser.add_argument("--strength", type=float, help="the vector's own if absent")
    parser.add_argument("--limit", type=int, help="only the first documents of each task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--gen-kwargs", help="key=value,... over the tasks' generation settings")
    parser.add_argument("--arm", help="plain, or steered with --vector, if absent")
    parser.add_argument("--out", required=True, help="write result rows to this JSON file")
    parser.add_argument("--details", help="write a prediction row a document to this JSONL file")
    parser.set_defaults(module="measure_lmms_eval")


def _measure_answers(metrics: argparse._SubParsersAction) -> None:
    parser = metrics.add_parser("answers", help="a model's answers, as prediction rows")
    _answering(parser, 64)
    cli_lrv.measure_answers(parser)


def _measure(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("measure", help="score prediction rows, compare and export results")
    metrics = parser.add_subparsers(dest="metric", required=True, metavar="METRIC")
    chair = metrics.add_parser("chair", help="hallucinated objects in captions")
    pope = metrics.add_parser("pope", help="yes/no questions on existence; rows carry `answer`")
    amber = metrics.add_parser("amber", help="AMBER's descriptions and questions, by exact words")
    mementos = metrics.add_parser("mementos", help="objects and behaviours told of image sequences")
    mmhal = metrics.add_parser("mmhal", help="a judge's rating of answers, from 0 to 6")
    gqa = metrics.add_parser("gqa", help="a judge's view of whether free answers are right")
    gavie = _measure_gavie(metrics)
    reliance = _measure_reliance(metrics)
    for one in (chair, pope, amber, mementos, mmhal, gqa, gavie, reliance):
        one.add_argument(
            "--predictions", required=True, help="prediction rows, .jsonl or .jsonl.gz"
        )
        one.add_argument("--arm", default="plain", help="name of the model or method")
        _measured(one)
        one.set_defaults(module="measure", common=False)
    gavie.set_defaults(module="measure_gavie")
    reliance.set_defaults(module="measure_visual_reliance", skip_bad=False, details=None)
    for one in (chair, pope, amber, mementos, mmhal, gqa, gavie):
        one.add_argument("--details", help="write what each row was read as to this JSONL file")
        _answered_by(one)
    _chair_options(chair)
    _pope_options(pope)
    _amber_options(amber)
    _mementos_options(mementos)
    for one in (mmhal, gqa, gavie):
        _judge_options(one)
    _gavie_options(gavie)
    _measure_key_expressions(metrics)
    _measure_compare(metrics)
    _measure_export(metrics)
    _measure_lmms_eval(metrics)
    _measure_answers(metrics)


def _explain(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("explain", help="where an answer came from")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    tokens = kinds.add_parser("tokens", help="a heatmap for every word of the answer")
    _common_model(tokens)
    tokens.add_argument("--image", required=True)
    tokens.add_argument("--question", default="Describe the image.")
    tokens.add_argument("--answer", help="explain this answer instead of the model's own")
    tokens.add_argument("--out", default="firsthand-explanation", help="folder for maps and figure")
    tokens.set_defaults(module="explain_tokens")
    for add in (_explain_heads, _explain_head, _explain_logits):
        add(kinds)


def _explain_heads(kinds: argparse._SubParsersAction) -> None:
    heads = kinds.add_parser("heads", help="how well each attention head looks at what is named")
    _common_model(heads)
    _grounded_data(heads)
    heads.add_argument("--generated", action="store_true", help="on the model's own answers")
    heads.add_argument(
        "--smallest-mask", action="store_true", help="one expression a turn, as FiVL"
    )
    heads.add_argument("--max-new-tokens", type=int, default=64, help="of a generated answer")
    heads.add_argument("--out", default="firsthand-heads", help="folder for grids and figure")
    heads.set_defaults(module="explain_heads")


def _grounded_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="scenes", help="grounded Parquet or Hub id, or `scenes`")
    parser.add_argument("--split", default="validation", help="of the scenes or Hub data")
    parser.add_argument("--samples", type=int, help="only the first ones")


def _explain_head(kinds: argparse._SubParsersAction) -> None:
    head = kinds.add_parser("head", help="one attention head's view for every token")
    _common_model(head)
    head.add_argument("--layer", type=int, required=True)
    head.add_argument("--head", type=int, required=True)
    head.add_argument("--image", required=True)
    head.add_argument("--question", default="Describe the image.")
    head.add_argument("--answer", help="read this answer instead of the model's own")
    head.add_argument("--max-new-tokens", type=int, default=64, help="of the model's own answer")
    head.add_argument("--out", default="firsthand-head", help="folder for numbers and overlays")
    head.set_defaults(module="explain_heads")


def _explain_logits(kinds: argparse._SubParsersAction) -> None:
    logits = kinds.add_parser("logits", help="the word that each image token says, and its IoU")
    _common_model(logits)
    logits.add_argument("--image", help="one image, drawn; or give --data")
    _grounded_data(logits)
    logits.set_defaults(data=None)
    logits.add_argument("--words", help="draw and merge these, separated by commas")
    logits.add_argument("--out", default="firsthand-logits", help="folder for maps and figures")
    logits.set_defaults(module="explain_logits")


def _train(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("train", help="what follows training; recipes train")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    merge = actions.add_parser("merge", help="put trained adapters into their model")
    merge.add_argument(
        "--adapter",
        required=True,
        action="append",
        help="the folder that LoRA training wrote; again for each later round, in order",
    )
    _common_model(merge)
    merge.add_argument("--out", required=True, help="folder for the merged model and processor")
    merge.set_defaults(module="train_merge")
    _train_convert(actions)


def _train_convert(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("convert", help="a published checkpoint as a Hub-native one")
    parser.add_argument(
        "--kind",
        required=True,
        choices=(
            "llava",
            "llava-projector",
            "conv-llava",
            "minigpt4",
            "mplug-owl",
            "mplug-owl2",
            "lrv-lora",
        ),
        help="whose files; llava: LLaVA-1.5's and SIMA's",
    )
    parser.add_argument("--weights", required=True, help="the model's own file or folder")
    parser.add_argument("--vision", help="file or folder of the vision encoder, where it is apart")
    parser.add_argument("--qformer", help="file of BLIP-2's Q-Former (minigpt4)")
    parser.add_argument("--language", help="folder of the Llama; lrv-lora: of the converted model")
    parser.add_argument("--out", required=True, help="folder for model and processor, or adapter")
    parser.set_defaults(module="convert_checkpoint")


def _staged(parser: argparse.ArgumentParser, data: str) -> None:
    parser.add_argument("--data", required=True, help=f"Parquet or Hub id of {data}")
    parser.add_argument("--split", default="train", help="of the Hub's data set")
    parser.add_argument("--out", required=True, help="folder for Parquet")
    parser.add_argument("--workers", type=int, default=1, help="shards under way at once")


def _answering(parser: argparse.ArgumentParser, tokens: int) -> None:
    _common_model(parser)
    parser.add_argument("--endpoint", help="base URL; its key is read from OPENAI_API_KEY")
    parser.add_argument("--endpoint-model", help="the name that the endpoint knows the model by")
    parser.add_argument("--max-new-tokens", type=int, default=tokens, help="of an answer")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in one call of generate")


def _augment_responses(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("responses", help="a model's own answers, greedy and drawn")
    _staged(parser, "prompts (images, question)")
    _answering(parser, 1024)
    parser.add_argument("--candidates", type=int, default=1, help="drawn answers a prompt")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0, help="of drawn answers")
    parser.set_defaults(module="augment_responses")


def _augment_critique(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("critique", help="which of a prompt's responses is better")
    _staged(parser, "responses")
    _answering(parser, 512)
    parser.add_argument(
        "--scorer",
        default="critic",
        help="critic, chair, evidence (visual support of object words), or package.module:function",
    )
    critic = parser.add_argument_group("critic")
    critic.add_argument(
        "--orders", default="both", choices=("both", "one"), help="one: drawn response first"
    )
    critic.add_argument(
        "--reading",
        default="strict",
        choices=("strict", "published", "choice"),
        help="of a verdict; choice: the more probable of 1 and 2, without a reason",
    )
    critic.set_defaults(temperature=1.0, top_p=1.0, seed=0)
    _chair_truth(parser).add_argument(
        "--recall-weight", type=float, default=0.0, help="score: weight * recall - CHAIR_i"
    )
    evidence = parser.add_argument_group("evidence")
    evidence.add_argument("--support-weight", type=float, default=0.5)
    evidence.add_argument("--ceiling", type=float, default=5.0, help="nats of support that count")
    evidence.add_argument("--threshold", type=float, default=0.0, help="nats of a clean word")
    parser.set_defaults(module="augment_critique")


def _augment_preferences(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("preferences", help="critiques as preference rows for training")
    _staged(parser, "critiques")
    parser.add_argument(
        "--clean-only", action="store_true", help="only responses without hallucination are chosen"
    )
    parser.add_argument("--min-margin", type=float, default=0.0, help="least difference of scores")
    parser.add_argument(
        "--weights", action="store_true", help="weigh each pair by its difference of scores"
    )
    parser.set_defaults(module="augment_preferences")


def _augment(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("augment", help="make training data out of conversations")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for add in (
        *(_augment_responses, _augment_critique, _augment_preferences),
        cli_lrv.augment_lrv,
    ):
        add(kinds)
    fivl = kinds.add_parser("fivl", help="key expressions of answers and their masks")
    fivl.add_argument("--data", required=True, help="LLaVA-format JSON(L), Parquet or Hub id")
    fivl.add_argument("--images", help="folder that the records' image paths start from")
    fivl.add_argument("--out", required=True, help="folder for Parquet and card")
    fivl.add_argument(
        "--segmenter",
        default="vision-logits",
        choices=(
            "vision-logits",
            "annotated",
            "sam3",
            "grounding-dino+sam",
            "mm-grounding-dino+sam2",
            "grounding-dino+segment-anything",
        ),
        help="what finds an expression in the image; annotated: masks that the records carry",
    )
    fivl.add_argument("--model", help="of vision-logits (the demo model if absent) or sam3")
    fivl.add_argument("--detector", help="of grounding-dino+..., where not its published one")
    fivl.add_argument("--mask-model", help="of ...+sam, ...+sam2 or ...+segment-anything")
    fivl.add_argument("--expressions", default="noun-phrases", choices=("noun-phrases", "endpoint"))
    fivl.add_argument("--endpoint", help="base URL; its key is read from OPENAI_API_KEY")
    fivl.add_argument("--endpoint-model", help="the name that the endpoint knows the model by")
    fivl.add_argument("--split", default="train", help="of --data, where it has splits")
    fivl.add_argument("--workers", type=int, default=1, help="shards under way at once")
    fivl.set_defaults(module="augment_fivl")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="firsthand",
        description="Find out, explain and mend hallucination in vision-language models.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_demo, _augment, _train, _measure, _explain, cli_steer.add, _env):
        add(verbs)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Expected failures become one line on stderr and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        return import_module(f"firsthand.recipes.{args.module}").run(args)
    except KeyboardInterrupt:
        print(
            "\nfirsthand: stopped; what was finished is kept, run again to go on", file=sys.stderr
        )
        return 130
    except EXPECTED as error:
        if os.environ.get("FIRSTHAND_DEBUG"):
            raise
        print(f"firsthand: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
