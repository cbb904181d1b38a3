"""`bench.iteration` measures what it says: plans, floors and ratios are right, and a tiny model goes through."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from bench import iteration, iteration_floor, iteration_report, iteration_scaling
from bench.iteration import Run
from bench.iteration_floor import Products
from fastppo import config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that generates and classifies, with room for a chat and its reply."""
    path = str(tmp_path_factory.mktemp("model"))
    tiny.policy(max_position_embeddings=512).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def run_of(folder, **changes):
    """One iteration of fastppo on *short*, but for the changes."""
    return replace(Run("short", "fastppo", "separate", "float32", 4, folder, 0, 1), **changes)


# What is run


def planned(*arguments):
    runs = iteration.plan(iteration.parse([*arguments, "--model", "somewhere"]))
    return [(r.recipe, r.side, r.layout, r.precision, r.micro_batch) for r in runs]


def test_by_default_short_with_every_choice_that_may_be_best(monkeypatch):
    monkeypatch.setattr(config, "multiplies_bfloat16", lambda use_cpu: True)
    assert planned() == [
        ("short", "trl", "separate", "float32", 4),
        ("short", "trl", "separate", "float32", 16),
        ("short", "trl", "separate", "autocast", 4),
        ("short", "trl", "separate", "autocast", 16),
        ("short", "fastppo", "separate", "bfloat16", 4),
        ("short", "fastppo", "separate", "bfloat16", 16),
    ]


def test_float32_where_the_processor_has_no_products_of_bfloat16(monkeypatch):
    monkeypatch.setattr(config, "multiplies_bfloat16", lambda use_cpu: False)
    assert [(side, precision) for _, side, _, precision, _ in planned("--micro-batch", "4")] == [
        ("trl", "float32"),
        ("fastppo", "float32"),
    ]


def test_what_a_side_does_not_have_is_left_out():
    runs = planned(
        "--layout", "separate", "shared", "--precision", "autocast", "bfloat16", "--micro-batch", "8"
    )
    assert runs == [
        ("short", "trl", "separate", "autocast", 8),
        ("short", "trl", "separate", "bfloat16", 8),
        ("short", "fastppo", "separate", "bfloat16", 8),
        ("short", "fastppo", "shared", "bfloat16", 8),
    ]


def test_only_fastppo_reuses_its_scoring():
    runs = iteration.plan(
        iteration.parse(
            [
                "--model",
                "x",
                "--micro-batch",
                "4",
                "--precision",
                "float32",
                "--reuse-scoring-forward",
                "no",
                "yes",
            ]
        )
    )
    assert [(r.side, r.reuse) for r in runs] == [("trl", False), ("fastppo", False), ("fastppo", True)]
    assert str(runs[2]).endswith("micro-batches of 4, scoring reused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batch", "3"], "--micro-batch must divide 16 (--episodes), got 3"),
        (["--iterations", "0"], "--iterations at least 1"),
        (["--side", "trl", "--layout", "shared"], "no side has such a layout and precision"),
        (["--cuda-graphs"], "--cuda-graphs needs --device cuda"),
        (["--recipe", "tall"], "invalid choice: 'tall'"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        iteration.parse([*arguments, "--model", "somewhere"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["short", "long", "wide"])
def test_both_sides_are_told_the_same(recipe, folder):
    run = run_of(folder, recipe=recipe, micro_batch=8, warm_up=1, iterations=3)
    args = iteration.fastppo_config(run)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 2)
    assert (args.total_episodes, args.num_ppo_epochs) == (4 * 16, 4)
    # Nothing ends early, or all ends at the EOS: TRL has no other way to be told.
    stops = recipe == "long"
    assert (args.stop_token, args.min_new_tokens) == (("eos", 0) if stops else (None, 32))
    assert args.response_length == (256 if stops else 32)


def test_lengths_end_with_the_first_eos():
    responses = [[5, 6, 2, 7, 2], [2, 0, 0, 0, 0], [5, 6, 7, 8, 9]]
    assert iteration.lengths_to_eos(responses, 2) == ([3, 1, 5], 1)
    assert iteration.lengths_to_eos(responses, None) == ([5, 5, 5], 3)


# The floor


def test_the_floor_by_hand():
    products = Products(
        trunk_forward=1,
        trunk_backward=2,
        head_forward=10,
        head_backward=20,
        steps={1: 100, 2: 300},
        dtype="float32",
        tflops=1,
    )
    prompts, lengths = [[7, 8, 1], [7, 8, 2, 3]], [3, 2]
    # Prompts have 5 tokens, for 7 and 8 come once. Rollout: two first tokens, one step of both rows, one of the longer.
    rollout = 5 * 1 + 2 * 10 + 300 + 100
    separate = {"rollout": rollout, "score": 4 * 10 + 2 * 5 * 10, "update": 3 * (2 * 10 * 3 + 5 * 30)}
    assert iteration_floor.floor(products, prompts, lengths, shared=False, epochs=3) == {
        **separate,
        "total": sum(separate.values()),
    }
    shared = iteration_floor.floor(products, prompts, lengths, shared=True, epochs=3)
    assert (shared["score"], shared["update"]) == (3 * 10 + 2 * 5 * 10, 3 * (10 * 3 + 5 * 30))
    reused = iteration_floor.floor(products, prompts, lengths, shared=False, epochs=3, reused=True)
    assert reused == {**separate, "update": separate["update"] - 2 * 10 - 5 * 10, "total": reused["total"]}
    alone = iteration_floor.floor(products, [[7]], [1], shared=True, epochs=3)
    assert alone["rollout"] == 1 + 10  # no step: the prefill gives the first token


@pytest.mark.parametrize(
    ("prompts", "common"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 2), ([[1], [2]], 0), ([[1, 2]], 2)],
)
def test_common_start(prompts, common):
    assert iteration_floor.common_start(prompts) == common


def test_the_floor_knows_the_models_matrices(folder):
    trunk, head = iteration_floor.weight_shapes(folder)
    layer = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]  # q k v o, gate up down
    assert (trunk, head) == (2 * layer, (tiny.VOCABULARY, 32))


def test_products_are_timed_for_the_rows_there_are(folder):
    products = iteration_floor.measure(folder, [[1, 2]] * 16, [[3] * 16])
    assert list(products.steps) == [1, 4, 8, 16]
    seconds = [products.trunk_forward, products.trunk_backward, products.head_forward, products.head_backward]
    assert all(x > 0 for x in [*seconds, *products.steps.values(), products.tflops])


# The report


def result(side="fastppo", *, seconds=1.0, peak=1.0, lengths=(32, 32), **changes):
    rooms = {"rollout": 0.2 * seconds, "score": 0.3 * seconds, "update": 0.5 * seconds, "total": seconds}
    return {
        "recipe": "short", "model": "/models/M", "side": side, "layout": "separate",
        "precision": "bfloat16" if side == "fastppo" else "autocast", "micro_batch": 4, "tokens": 32, "stops": False,
        "iterations": [{**rooms, "lengths": list(lengths), "truncated": 1}] * 2,
        "floors": [dict.fromkeys(rooms, 0.25)] * 2, "peak_gb": peak,
        "products": {"dtype": "bfloat16"},
        "machine": {"processor": "P", "threads": 2, "torch": "2"}, **changes,
    }  # fmt: skip


def test_ratios_are_to_the_fastest_and_to_the_smallest_that_learns():
    results = [
        result("trl", seconds=8, peak=4, precision="float32"),
        result("trl", seconds=6, peak=5),
        result("trl", seconds=5, peak=8, micro_batch=16),
        result("trl", seconds=1, peak=1, precision="bfloat16"),  # its steps round to nothing
        result(seconds=2, peak=2),
        result(seconds=3, peak=1.5, micro_batch=16),
        result(seconds=1, peak=1, layout="shared", lengths=(32, 16)),
    ]
    ratios = iteration_report.ratios(results)
    assert (ratios["separate"]["episodes/s"], ratios["separate"]["tokens/s"]) == (2.5, 2.5)
    assert ratios["separate"]["memory"] == 0.5
    # Both are of one run: the fastest is not paired with another's memory.
    assert ratios["separate"]["own"] == "fastppo separate bfloat16, 4"
    assert (ratios["shared"]["episodes/s"], ratios["shared"]["tokens/s"]) == (5, 3.75)
    assert iteration_report.ratios(results[:4]) == iteration_report.ratios(results[4:]) == {}


def test_the_table_has_rooms_shares_and_ratios():
    table = iteration_report.table("long (M)", [result("trl", seconds=4, stops=True), result(stops=True)])
    row = next(line for line in table.splitlines() if line.startswith("fastppo separate bfloat16, 4 "))
    cells = row.split("bfloat16, 4")[1].split("  ")
    assert [c.strip() for c in cells if c.strip()] == [
        "0.20 (125 %)", "0.30 (83 %)", "0.50 (50 %)", "1.00 (25 %)", "2.00", "64.00", "1.00"
    ]  # fmt: skip
    assert "4.00 times TRL's episodes/s" in table and "32 to 32 tokens, median 32; 2 of 4 cut" in table


def test_results_are_kept_and_replaced(tmp_path):
    first, other = result(seconds=2), result(seconds=3, micro_batch=16)
    results = iteration_report.merge(iteration_report.merge([], first), other)
    iteration_report.write(results, tmp_path)
    results = iteration_report.merge(iteration_report.read(tmp_path), result(seconds=1))
    assert [(r["micro_batch"], iteration_report.median(r)) for r in results] == [(16, 3), (4, 1)]
    assert iteration_report.read(tmp_path / "nothing") == []


def test_the_clock_charges_a_room_until_the_next():
    clock = iteration.RoomClock()
    clock.start()
    for room in ("rollout", "score", "rollout", "update"):
        clock.enter(room)
        clock.entered -= 10  # as if ten seconds had passed
    clock.note([3, 4], 1)
    clock.finish_iteration()
    (found,) = clock.iterations
    assert {room: round(found[room]) for room in ("rollout", "score", "update", "total")} == {
        "rollout": 20,
        "score": 10,
        "update": 10,
        "total": 40,
    }
    assert (found["lengths"], found["truncated"]) == ([3, 4], 1)


# Runs of a tiny model


@pytest.fixture
def here(monkeypatch):
    """Runs are measured in this process, which saves loading torch and transformers for each."""
    monkeypatch.setattr(iteration, "in_process", lambda run: json.loads(json.dumps(iteration.measure(run))))


def test_both_layouts_in_one_json_and_one_png(folder, tmp_path, here, capsys):
    common = [
        "--side",
        "fastppo",
        "--precision",
        "bfloat16",
        "--warm-up",
        "1",
        "--iterations",
        "1",
        "--model",
        folder,
        "--micro-batch",
        "4",
    ]
    common += ["--output", str(tmp_path)]
    iteration.main([*common, "--layout", "separate"])
    iteration.main([*common, "--layout", "shared", "--add"])
    separate, shared = json.loads((tmp_path / "iteration.json").read_text())["results"]
    assert (separate["layout"], shared["layout"]) == ("separate", "shared")
    for found in (separate, shared):
        (counted,) = found["iterations"]
        assert len(found["warm_up"]) == 1 and counted["lengths"] == [32] * 16
        rooms = sum(counted[room] for room in iteration_report.ROOMS)
        assert 0.9 * counted["total"] < rooms <= counted["total"]
        assert found["floors"][0]["total"] > 0
        assert found["peak_gb"] >= found["loaded_gb"] > 0.1
    assert (tmp_path / "iteration.png").stat().st_size > 10_000
    assert "fastppo shared bfloat16, 4" in capsys.readouterr().out


def test_long_counts_tokens_up_to_the_eos(folder):
    (counted,) = iteration.in_process(run_of(folder, recipe="long", layout="shared", micro_batch=16))[
        "iterations"
    ]
    assert len(set(counted["lengths"])) > 1 and max(counted["lengths"]) <= 256
    assert counted["truncated"] == counted["lengths"].count(256)


def test_a_run_that_takes_more_than_the_limit_fails(folder):
    with pytest.raises(SystemExit, match=r"--memory-limit: took 0\.\d+ GB, the limit is 0\.2 GB"):
        iteration.in_process(run_of(folder, memory_limit=0.2))


def test_trl_runs_with_autocast_and_counts_the_same_tokens(folder):
    run = run_of(folder, side="trl", recipe="long", precision="autocast", memory_limit=20.0)
    (counted,) = iteration.in_process(run)["iterations"]
    assert all(counted[room] > 0 for room in iteration_report.ROOMS)
    assert len(set(counted["lengths"])) > 1 and max(counted["lengths"]) <= 256


def test_trl_without_the_autocast_that_it_was_told_to_use_fails(folder):
    path = os.pathsep.join([str(iteration.fetch_trl("1.12.0")), str(ROOT)])
    run = json.dumps(vars(run_of(folder, side="trl", precision="autocast")))
    done = subprocess.run(
        [sys.executable, "-m", "bench.iteration", "--run", run],
        env={**os.environ, "PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "Accelerate's mixed precision is no" in done.stderr


# Scaling


def test_exponents_are_slopes_of_logarithms():
    sizes = [2.0, 4.0, 8.0]
    assert iteration_scaling.exponent(sizes, [3 * x**2 for x in sizes]) == pytest.approx(2)
    assert iteration_scaling.exponent(sizes, [5.0] * 3) == pytest.approx(0)
    assert iteration_scaling.slope(sizes, [7 + 3 * x for x in sizes]) == pytest.approx(3)


def test_scaling_of_a_small_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(iteration_scaling, "AXES", {"vocabulary": (1024, 32768)})
    monkeypatch.setattr(iteration_scaling, "BASE", iteration_scaling.Size(length=4, batch=4, layers=1))
    iteration_scaling.main(["vocabulary"], "float32", tmp_path)
    found = json.loads((tmp_path / "scaling.json").read_text())["vocabulary"]
    assert [p["vocabulary"] for p in found["points"]] == [1024, 32768]
    # Weights, reference and two moments: 16 bytes for each of a row's 576 numbers.
    assert found["fit"]["bytes"]["resident"] == pytest.approx(16 * 576, rel=0.2)
    # The gradient, and what autograd adds up to it; what the tokens of a micro-batch take does not count here.
    assert 0.9 * 4 * 576 < found["fit"]["bytes"]["update"] < 4 * 4 * 576
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert "memory per unit of vocabulary" in capsys.readouterr().out
