"""The results of a comparison against numbers worked out by hand, one loop over all of them."""

import csv
import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from rich.console import Console

from moe_jax.errors import InputError
from pruning.report.compared import COPIES, MERGED, Result
from pruning.report.comparison import Comparison
from pruning.report.comparison_page import comparison_page
from pruning.report.comparison_sizes import size_tables

TOKENS = {"wiki": 1200, "code": 300}
DENSE = {"wiki": 2.0, "code": 1.0}
# (rule, rate) -> seed -> added nats on wiki and on code. At 0.5 random channels happen to help.
ADDED = {
    ("random", 0.25): [(0.5, 0.7), (0.8, 1.2), (0.4, 0.4)],
    ("smart[2]", 0.25): [(0.10, 0.25)],
    ("better", 0.25): [(0.05, 0.02)],
    ("random", 0.5): [(-0.1, -0.3), (-0.2, -0.1), (-0.3, -0.2)],
    ("better", 0.5): [(1.6, 1.4)],
    ("smart[2]", 0.5): [(0.3, 0.4)],
    ("late", 0.5): [(0.2, 0.1)],
}


def result(rule: str, rate: float, seed: int, added: tuple[float, float]) -> Result:
    place = list(ADDED).index((rule, rate)) + 1
    quality = {
        text: {"nll": DENSE[text] + more, "tokens": TOKENS[text], "perplexity": 7.0,
               "kl": place / 8 + more / 16, "top1": 0.9 - place / 64 - seed / 32 - slot / 128}
        for slot, (text, more) in enumerate(zip(DENSE, added, strict=True))
    }  # fmt: skip
    return Result(rule, rate, seed, kept=int(800 * (1 - rate)), emptied=3 * place + seed,
                  quality=quality, family=f"family of {rule}", about=f"about {rule}")  # fmt: skip


@pytest.fixture
def comparison() -> Comparison:
    dense = {text: {"nll": nll, "tokens": TOKENS[text], "perplexity": 7.0, "kl": None, "top1": None}
             for text, nll in DENSE.items()}  # fmt: skip
    results = tuple(
        result(rule, rate, seed, added)
        for (rule, rate), seeds in ADDED.items()
        for seed, added in enumerate(seeds)
    )
    refused = (Result("late", 0.25, reason="the budget pays for no expert"),
               Result("late", 0.75, reason="the budget pays for no expert"))  # fmt: skip
    return Comparison({"block": 8}, dense, results, refused, {"dense": 900, "experts": 700},
                      {"wiki": 0.5, "code": 0.0})  # fmt: skip


def by_hand(comparison: Comparison) -> list[tuple]:
    """Rows (rate, added, rule, share of random, spread, kl, top1, emptied), best first."""
    rows = []
    for (rule, rate), seeds in ADDED.items():
        own = [r for r in comparison.results if (r.rule, r.rate) == (rule, rate)]
        means = [sum(pair) / 2 for pair in seeds]
        chance = [sum(pair) / 2 for pair in ADDED["random", rate]]
        added, by_chance = sum(means) / len(means), sum(chance) / len(chance)
        measured = [q for r in own for q in r.quality.values()]
        kl, top1 = (sum(q[n] for q in measured) / len(measured) for n in ("kl", "top1"))
        share = added / by_chance if by_chance > 0 else float("nan")
        spread = (max(means) - min(means)) / 2
        rows.append((rate, added, rule, share, spread, kl, top1,
                     sum(r.emptied for r in own) / len(own)))  # fmt: skip
    return sorted(rows)


def test_a_line_is_the_mean_over_texts_and_seeds(comparison):
    wanted = by_hand(comparison)
    found = comparison.lines()
    assert [(line.rate, line.rule) for line in found] == [(row[0], row[2]) for row in wanted]
    assert [(line.family, line.about) for line in found] == [
        (f"family of {line.rule}", f"about {line.rule}") for line in found
    ]
    numbers = [
        (line.added, line.of_random, line.spread, line.kl, line.top1, line.emptied)
        for line in found
    ]
    np.testing.assert_allclose(numbers, [(row[1], *row[3:]) for row in wanted], rtol=1e-12)
    assert np.isnan([line.of_random for line in found if line.rate == 0.5]).all()
    assert not np.isnan([line.of_random for line in found if line.rate == 0.25]).any()
    assert comparison.rates == [0.25, 0.5, 0.75]
    # By the loss at the first rate; a rule without one there by that at the next.
    assert comparison.ranked() == ["better", "smart[2]", "random", "late"]


def cells(row: tuple) -> list[str]:
    _, added, _, share, spread, kl, top1, _ = row
    more = f" ±{spread:.3f}" if spread else ""
    return [f"{added:.4f}{more}", "-" if share != share else f"{share:.2f}", f"{kl:.4f}",
            f"{100 * top1:.1f}%"]  # fmt: skip


def test_tables_hold_every_rule_at_every_rate(comparison):
    known = {(row[2], row[0]): cells(row) for row in by_hand(comparison)}
    table, none = comparison.table(), ["-"] * 4
    assert table.title == "Rules, best first"
    shares = ["÷ random", "KL", "top-1"]
    assert table.header == ["", "rule", "+nats 0.25", *shares, "+nats 0.5", *shares,
                            "+nats 0.75", *shares]  # fmt: skip
    assert table.rows == [
        [str(place), rule, *known.get((rule, 0.25), none), *known.get((rule, 0.5), none), *none]
        for place, rule in enumerate(["better", "smart[2]", "random", "late"], 1)
    ]
    assert "Mean over 2 texts, 1,500 tokens in all." in table.note
    assert table.note.startswith("Calibration has shown at least 50% of wiki (runs of 13 tokens)")
    one = comparison.rate_table(0.5)
    assert one.title == "Rules at prune rate 0.5, best first" and one.note == table.note
    assert one.header == ["", "rule", "+nats", *shares, "what it is"]
    assert one.rows == [
        [str(place), rule, *known[rule, 0.5], f"about {rule}"]
        for place, rule in enumerate(["random", "late", "smart[2]", "better"], 1)
    ]


def test_a_row_without_rows_of_the_router_says_so():
    row = Result("experts-reap", 0.5, cut=True, bits=4)
    assert row.name == "experts-reap+cut 4-bit"


def test_sizes_of_merged_experts_say_that_they_count_each_once(comparison):
    row = dataclasses.replace(comparison.results[3], rule="ream", family=MERGED, bits=4, bytes=9)
    merged = comparison.with_results([row], ())
    for found, said in ((comparison, False), (merged, True)):
        tables = [found.table(), found.rate_table(0.25)]
        assert all(table.note.endswith(COPIES) == said for table in tables)
    assert all(table.note.endswith(COPIES) for table in size_tables(merged))
    assert len(size_tables(merged)) == 1 and COPIES in comparison_page(merged)


def test_a_terminal_shows_the_columns_that_fit_and_rules_whole(comparison):
    table = comparison.table()
    wide = [max(len(row[c]) for row in (table.header, *table.rows)) + 2
            for c in range(len(table.header))]  # fmt: skip
    kinds = ["", "rule", *["+nats", "÷ random", "KL", "top-1"] * 3]
    kept = [
        kinds,
        [k for k in kinds if k != "top-1"],
        [k for k in kinds if k not in ("KL", "top-1")],
    ]
    needed = [sum(w for w, k in zip(wide, kinds, strict=True) if k in left) for left in kept]
    for width, shown in ((needed[0], 0), (needed[0] - 1, 1), (needed[1], 1), (needed[1] - 1, 2),
                         (5, 2)):  # fmt: skip
        columns = comparison.terminal_table(width).columns
        assert [str(c.header).partition(" 0.")[0] for c in columns] == kept[shown]
    assert len(comparison.terminal_table().columns) == len(kept[2])
    shown = comparison.terminal_table(needed[0])
    assert [(c.justify, c.no_wrap) for c in shown.columns[:3]] == [
        ("right", False), ("left", True), ("right", False),
    ]  # fmt: skip
    console = Console(width=needed[0], file=io.StringIO())
    console.print(shown)
    lines = console.file.getvalue().splitlines()
    assert lines[0].strip() == table.title and "smart[2]" in console.file.getvalue()
    assert " ".join(console.file.getvalue().split()).endswith(" ".join(table.note.split()))
    (row,) = (line for line in lines if line.split()[:2] == ["3", "random"])
    assert row.split() == " ".join(table.rows[2]).split()
    assert "smart[2]" in lines[lines.index(row) - 1] and " late " in lines[lines.index(row) + 1]


def test_the_csv_has_a_row_per_result_and_text_and_the_json_all_of_it(comparison, tmp_path):
    comparison.save(tmp_path)
    rows = list(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    pairs = list(itertools.product(comparison.results, DENSE))
    assert len(rows) == len(pairs)
    for row, (one, text) in zip(rows, pairs, strict=True):
        q = one.quality[text]
        added = q["nll"] - DENSE[text]
        wanted = {"rule": one.rule, "family": one.family, "rate": one.rate, "seed": one.seed,
                  "kept": one.kept, "emptied": one.emptied, "text": text, "tokens": q["tokens"],
                  "nll": q["nll"], "added": added, "kl": q["kl"], "top1": q["top1"],
                  "repair": one.repair, "bits": one.bits, "target": one.target,
                  "bytes": one.bytes, "draw": one.draw, "overlap": one.overlap,
                  "top_k": one.top_k, "skip_below": one.skip_below,
                  "calibration": one.calibration, "parameters": one.parameters,
                  "active": one.active, "active_bytes": one.active_bytes,
                      "cut": int(one.cut)}  # fmt: skip
        assert row == {name: str(value) for name, value in wanted.items()}
    assert (tmp_path / "compare.csv").read_text().endswith("\n")
    assert (tmp_path / "compare.json").read_text().endswith("}\n")
    assert Comparison.load(tmp_path / "compare.json") == comparison


def test_results_are_added_at_one_budget_and_chosen_by_rule_and_rate(comparison):
    more = result("late", 0.5, 1, (0.1, 0.1))
    refused = Result("other", 0.5, reason="no")
    assert (refused.seed, refused.kept, refused.emptied, refused.quality) == (0, 0, 0, {})
    found = comparison.with_results([more], [refused])
    assert found.results == (*comparison.results, more)
    assert found.refused == (*comparison.refused, refused) and found.seen == comparison.seen
    with pytest.raises(InputError, match=r"budgets at prune rate 0\.5 differ: \[400, 401\]"):
        comparison.with_results([Result("other", 0.5, kept=401)], [])
    part = comparison.only(lambda r: r.rule in ("late", "better") and r.rate == 0.25)
    assert [(r.rule, r.rate) for r in part.results] == [("better", 0.25)]
    assert [(r.rule, r.rate) for r in part.refused] == [("late", 0.25)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(dense={}), "lacks what was measured"),
        (lambda s: s["dense"].pop("code"), "lacks what was measured"),
        (lambda s: s["results"][3]["quality"].pop("code"), "lacks what was measured"),
        (lambda s: s["results"][3]["quality"]["code"].pop("kl"), "lacks what was measured"),
        (lambda s: s["dense"]["code"].update(nll=None), "lacks what was measured"),
        (lambda s: s.update(sizes={"dense": "1"}), "sizes hold something else"),
        (lambda s: s.update(sizes={"dense": 1}), "lacks what was measured"),
        (lambda s: s.update(sizes={"dense": 2, "experts": 1, "more": 1}), "lacks what was"),
        (lambda s: s["results"][0].update(rate="0.5"), "a result holds something else"),
        (lambda s: s["refused"][0].update(reason=5), "a result holds something else"),
        (lambda s: s["results"][0].pop("rule"), "a result holds something else"),
        (lambda s: s.pop("refused"), "refused"),
        (lambda s: s.update(other=1), "other"),
    ],
)
def test_a_file_that_lacks_something_is_damaged(comparison, tmp_path, change, message):
    comparison.save(tmp_path)
    path = tmp_path / "compare.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=rf"compare\.json is damaged \(.*{message}.*remove it"):
        Comparison.load(path)


def test_long_damage_is_told_in_short(comparison, tmp_path):
    comparison.save(tmp_path)
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"x" * 5000: 1}))
    with pytest.raises(InputError) as caught:
        Comparison.load(path)
    told = str(caught.value).partition("is damaged (")[2].partition(");")[0]
    assert len(told) == 1000
