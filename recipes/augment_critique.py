"""`firsthand augment critique`: which of a model's own responses is better, and why it counts.

What it is: SIMA's in-context critic (arXiv 2405.15973, section 3.2), or a scorer in its place, as a
resumable stage. The critic sees every pair of a prompt in both orders; where the orders disagree it
is a tie. What it is not: a data set for training (`augment preferences` makes it).

    firsthand augment critique --data responses --out critiques
    firsthand augment critique --data responses --out critiques --scorer chair --objects o.json

A prompt without a verdict (tie, unparsed, over-long, ...) is kept in OUT/dropped with the reason.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from firsthand.processing import critic
from firsthand.recipes import conversations
from firsthand.recipes.answering import Answerer, Request
from firsthand.recipes.augment_responses import (
    RESPONSE,
    answerer_of,
    marked,
    parquet_source,
    prompt_key,
    prompt_problem,
    report,
    require_columns,
    spoken,
    too_few,
)
from firsthand.recipes.scorers import ChairScorer, EvidenceScorer, FunctionScorer, Score, Scorer
from firsthand.recipes.scorers import imported as imported_function
from firsthand.recipes.stages import DROPPED, Row, Step, keep_plan, run_stages

COMPARISON = {
    "first": pa.int32(),  # places in `responses`
    "second": pa.int32(),
    "verdict": pa.string(),  # 1, 2, tie, unparsed, over-long, no reply
    "replies": pa.list_(pa.string()),  # of each order
}
OVER_LONG = "over-long"
NO_VERDICT = (OVER_LONG, "no reply", "unparsed", "tie")  # what is told first where several hold


class Judge(Step):
    """Adds a score to every usable response; a row goes on where they are not all equal."""

    columns: ClassVar[dict[str, pa.DataType]] = {
        "prompt_key": pa.string(),
        "responses": pa.list_(pa.struct(RESPONSE)),
        "scores": pa.list_(pa.float64()),  # of each response, null where it cannot be used
        "clean": pa.list_(pa.bool_()),  # free of hallucination; null where not known
        "comparisons": pa.list_(pa.struct(COMPARISON)),
        "critic": pa.string(),
    }

    def checked(self, row: Row) -> Row:
        """The row with its key and its responses checked again, or dropped with the reason."""
        row = {**row, "scores": [], "clean": [], "comparisons": []}
        if problem := prompt_problem(row):
            return {**row, DROPPED: f"{self.name}: {problem}"}
        fresh = [{"source": "", "problem": None, **one} for one in row["responses"] or ()]
        row |= {"responses": marked(fresh), "prompt_key": prompt_key(row)}
        problem = too_few(row["responses"])
        return {**row, DROPPED: f"{self.name}: {problem}"} if problem else row

    def scored(self, row: Row, scores: dict[int, Score], critic_name: str, without: str) -> Row:
        """The row with a score at each place of `scores`; dropped as `without` if all are equal."""
        places = range(len(row["responses"]))
        row |= {
            "scores": [scores[i].value if i in scores else None for i in places],
            "clean": [scores[i].clean if i in scores else None for i in places],
            "critic": critic_name,
        }
        if len({score.value for score in scores.values()}) < 2:
            row[DROPPED] = f"{self.name}: {without}"
        return row


class Criticise(Judge):
    """The critic compares every pair of usable responses; a score is wins minus losses.

    Args:
        answerer: the critic.
        orders: "both", or "one": the drawn response first, as SIMA has it.
        reading: "strict" or "published" (how SIMA's script reads a verdict), or "choice": the more
            probable verdict, without a reason, over both orders together (a model of this process).
    """

    def __init__(self, answerer: Answerer, orders: str = "both", reading: str = "strict") -> None:
        super().__init__()
        self.answerer, self.orders, self.reading = answerer, orders, reading

    def batch(self, rows: list[Row]) -> list[Row]:
        rows = [self._without_marks(self.checked(row)) for row in rows]
        compared = [(row, *pair) for row in rows for pair in _pairs(row)]
        asked = [self._requests(*one) for one in compared]
        problems = [self._too_long(requests) for requests in asked]
        short = [r for r, problem in zip(asked, problems, strict=True) if problem is None]
        replies = iter(self._ask([request for requests in short for request in requests]))
        for (row, first, second), requests, problem in zip(compared, asked, problems, strict=True):
            said = [] if problem else [next(replies) for _ in requests]
            found = {"verdict": OVER_LONG, "replies": [problem]} if problem else self._verdict(said)
            row["comparisons"].append({"first": first, "second": second, **found})
        return [row if DROPPED in row else self._decided(row) for row in rows]

    def _too_long(self, requests: list[Request]) -> str | None:
        return next(filter(None, map(self.answerer.too_long, requests)), None)

    def _without_marks(self, row: Row) -> Row:
        """A response that carries a verdict of its own cannot be compared."""
        if DROPPED in row:
            return row
        for one in row["responses"]:
            if one["problem"] is None and critic.holds_verdict(one["text"]):
                one["problem"] = "it holds a verdict of its own"
        problem = too_few(row["responses"])
        return {**row, DROPPED: f"{self.name}: {problem}"} if problem else row

    def _requests(self, row: Row, first: int, second: int) -> list[Request]:
        one, other = (row["responses"][i]["text"] for i in (first, second))
        orders = [(one, other)] if self.orders == "one" else [(one, other), (other, one)]
        truth = row.get("ground_truth") or ""
        prompts = [critic.question_of(row["question"], a, b, truth) for a, b in orders]
        return [Request(row["images"][0], row["prompt_key"], prompt) for prompt in prompts]

    def _ask(self, requests: list[Request]) -> list[Any]:
        if self.reading == "choice":
            return self.answerer.choose(requests, critic.START, ("1", "2"))
        return self.answerer.ask(requests)

    def _verdict(self, replies: list[Any]) -> Row:
        texts = [reply.text for reply in replies]
        if any(reply.error for reply in replies):
            errors = [reply.error or reply.text for reply in replies]
            return {"verdict": "no reply", "replies": errors}
        if self.reading == "choice":
            said = critic.likelier([reply.value for reply in replies])
            return {"verdict": str(said), "replies": texts}
        verdicts = [critic.READERS[self.reading](text) for text in texts]
        if len(verdicts) == 2 and verdicts[1] is not None:
            verdicts[1] = 2 if verdicts[1] == 1 else 1
        return {"verdict": str(critic.agreed(verdicts)), "replies": texts}

    def _decided(self, row: Row) -> Row:
        wins = {i: 0 for i, one in enumerate(row["responses"]) if one["problem"] is None}
        for one in row["comparisons"]:
            if one["verdict"] in ("1", "2"):
                won, lost = ("first", "second") if one["verdict"] == "1" else ("second", "first")
                wins[one[won]] += 1
                wins[one[lost]] -= 1
        verdicts = {one["verdict"] for one in row["comparisons"]}
        without = next((kind for kind in NO_VERDICT if kind in verdicts), "tie")
        scores = {i: Score(float(value)) for i, value in wins.items()}
        return self.scored(row, scores, f"critic {self.answerer.name}", without)


def _pairs(row: Row) -> list[tuple[int, int]]:
    """Places of all pairs to compare, the later (drawn) response first."""
    if DROPPED in row:
        return []
    usable = [i for i, one in enumerate(row["responses"]) if one["problem"] is None]
    return [(second, first) for first, second in combinations(usable, 2)]


class Rate(Judge):
    """A scorer gives every usable response a number of its own.

    Args:
        scorer: see `recipes/scorers.py`; a row for which it raises ValueError goes no further.
        about: its name in the rows.
    """

    def __init__(self, scorer: Scorer, about: str) -> None:
        super().__init__()
        self.scorer, self.about = scorer, about

    def batch(self, rows: list[Row]) -> list[Row]:
        return [self._rated(self.checked(row)) for row in rows]

    def _rated(self, row: Row) -> Row:
        if DROPPED in row:
            return row
        usable = [i for i, one in enumerate(row["responses"]) if one["problem"] is None]
        try:
            found = self.scorer(row, [row["responses"][i]["text"] for i in usable])
        except ValueError as error:
            return {**row, DROPPED: f"{self.name}: {error}"}
        return self.scored(row, dict(zip(usable, found, strict=True)), self.about, "tie")


@dataclass(frozen=True)
class Critique:
    """How responses are judged: see `augment critique --help`."""

    step: Judge
    about: dict[str, Any]


def critique(
    data: str, out: str | Path, judged: Critique, split: str = "train", workers: int = 1
) -> dict[str, int]:
    """Put the responses of `data`, scored, into `out/data`; call it again to go on after a stop.

    Args:
        data: what `augment responses` wrote, or rows with `images`, `question` and `responses`.
        out: a folder of its own.
        judged: by whom, and how.
        split: of the Hub's data set.
        workers: shards of 256 rows under way at once.

    Returns:
        Rows `kept` and `dropped`.

    Raises:
        ValueError: for rows without these columns, or an `out` with a run of other settings.
    """
    source = parquet_source(data, split, Path(out))
    hint = "responses are written by `firsthand augment responses`"
    require_columns(source, data, dict.fromkeys(("images", "question", "responses"), hint))
    about = {"data": conversations.fingerprint(data, split), **judged.about}
    keep_plan(Path(out) / "state" / "about.json", about)
    return run_stages(source, out, [judged.step], workers)


def critique_of(args: argparse.Namespace) -> Critique:
    """Who judges, from the command line. Raises ValueError for options that do not go together."""
    if args.scorer == "gavie":
        return _gavie_of(args)
    if args.scorer != "critic":
        return _scorer_of(args)
    answerer = answerer_of(args)
    if args.reading == "choice" and answerer.endpoint:
        raise ValueError("--reading choice needs a model of this process: leave --endpoint out")
    about = {"orders": args.orders, "reading": args.reading, **spoken(answerer)}
    return Critique(Criticise(answerer, args.orders, args.reading), about)


def _gavie_of(args: argparse.Namespace) -> Critique:
    from firsthand.recipes.critique_gavie import gavie_step

    answerer = answerer_of(args)
    if answerer.endpoint is None:
        raise ValueError("--scorer gavie needs a judge: give --endpoint and --endpoint-model")
    return Critique(*gavie_step(answerer.endpoint, answerer.cache, args.regions))


def _scorer_of(args: argparse.Namespace) -> Critique:
    if args.endpoint:
        raise ValueError(f"--scorer {args.scorer} asks no endpoint: leave --endpoint out")
    if args.scorer == "chair":
        from firsthand.recipes.measure import ground_truth, lexicon_of

        lexicon = lexicon_of(args)
        objects = ground_truth(args, lexicon)
        scorer: Any = ChairScorer(objects, lexicon, args.variant, args.recall_weight)
        about = {"variant": args.variant, "recall_weight": args.recall_weight}
    elif args.scorer == "evidence":
        scorer = EvidenceScorer(args.model, args.support_weight, args.ceiling, args.threshold)
        about = asdict(scorer)
    else:
        imported_function(args.scorer)
        scorer, about = FunctionScorer(args.scorer), {}
    return Critique(Rate(scorer, args.scorer), {"scorer": args.scorer, **about})


def run(args: argparse.Namespace) -> int:
    """The verb: judge, and print what came out."""
    counts = critique(args.data, args.out, critique_of(args), args.split, args.workers)
    report(Path(args.out), counts)
    return 0
