"""benchmarks/cifar10_accuracy: its policies are those it states, worked by hand, and it runs, stops and goes on."""

import itertools
import json
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import torchlars

np = pytest.importorskip("numpy")

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--synthetic", "--device", "cpu", "--width", "2", "--epochs", "1", "--warmup", "0.5", "--trials", "2"]
TINY += ["--batches", "640", "80", "320", "--base-batch", "80", "--microbatch", "160", "--seeds", "2"]


@pytest.fixture
def module(benchmark_module, threads):
    threads(1)
    return lambda name: benchmark_module(f"cifar10_accuracy.{name}")


@pytest.fixture
def main(module, tmp_path, extension):
    def run(*args):
        module("main").main([*TINY, "--results", str(tmp_path / "runs.jsonl"), *args])
        return [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()]

    return run


@pytest.fixture
def small(module):
    return module("data").synthetic(size=8)


def carried_out(plan, wanted, recipe, accuracy, workers=1, done=()):
    """Carry out a whole plan with made-up accuracies, and return its runs in the order in which they ended."""
    done, running = dict(done), []
    while True:
        runs = dict.fromkeys(run for run in plan.next_runs(done, wanted, recipe) if run not in running)
        running += list(runs)[: workers - len(running)]
        if not running:
            return done
        run = running.pop(len(done) % len(running))  # any of them may end first
        assert run not in done
        done[run] = {"curve": [[recipe.epochs, 0.0, accuracy(run)]]}


# --- Policies ---------------------------------------------------------------------------------------------------------


def test_schedule(module):
    factors = [module("training").lr_factor(step, steps=7, warmup_steps=3) for step in range(8)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.5625, 0.25, 0.0625, 0])


def test_epochs_are_equal_for_all_batch_sizes_to_the_nearest_step(module):
    recipe = module("training").Recipe("")
    assert (recipe.epochs, recipe.warmup) == (60, 10)
    steps = [recipe.steps(50_000, batch) for batch in (256, 2048, 8192, 16384, 32768)]
    assert steps == [11719, 1465, 366, 183, 92]  # 60 · 50,000 / batch
    assert [recipe.warmup_steps(50_000, batch) for batch in (256, 16384, 32768)] == [1953, 31, 15]
    assert recipe.steps(45_000, 16384) == 165


@pytest.mark.parametrize(
    ("optimizer", "kind", "base", "lrs", "decay"),
    [
        ("SGD", torch.optim.SGD, torch.optim.SGD, (2, 2), 5e-4),
        ("LARS", torchlars.LARS, torchlars.optim.SGD, (2, 0.4), 5e-4),  # 0.2 · √4
        ("LAMB", torchlars.LAMB, torch.optim.AdamW, (0.5, 0.5), 0.01),
    ],
)
def test_every_step_has_the_lr_of_its_policy(module, monkeypatch, extension, small, optimizer, kind, base, lrs, decay):
    training, seen = module("training"), []

    def make(*args, make=training.make_optimizer):
        optimizer = make(*args)
        optimizer.register_step_pre_hook(lambda each, *_: seen.append([group["lr"] for group in each.param_groups]))
        assert type(optimizer) is kind
        assert type(getattr(optimizer, "optim", optimizer)) is base
        weights, others = optimizer.param_groups
        assert (weights["weight_decay"], others["weight_decay"]) == (decay, 0)
        assert weights.get("momentum", 0.9) == 0.9
        assert len(weights["params"]) == 9  # eight convolutions and the head
        assert len(others["params"]) == 16
        return optimizer

    monkeypatch.setattr(training, "make_optimizer", make)
    recipe = training.Recipe("", epochs=2, warmup=0.5, width=2, base_batch=40, dtype="float32")
    data = module("data").Resident(small, torch.device("cpu"))
    found = training.train(training.Run("test", optimizer, 160, lrs[0], 0), recipe, data, torch.device("cpu"))
    assert (found["steps"], found["warmup_steps"]) == (8, 2)  # of 640 images
    factors = [0.5, 1, *((1 - step / 6) ** 2 for step in range(6))]
    assert seen == [pytest.approx([lr * factor for lr in lrs]) for factor in factors]


def test_a_sweep_climbs(module):
    next_trials = module("plan").next_trials

    def sweep(accuracy, trials=5, start=0.8):
        tried = {}
        while lrs := next_trials(start, tried, trials):
            tried[lrs[0]] = accuracy(lrs[0])
        return list(tried)

    assert sweep(lambda lr: -abs(lr - 0.8)) == [0.8, 1.6, 0.4, 1.13, 0.566]
    assert sweep(lambda lr: lr) == [0.8, 1.6, 0.4, 3.2, 6.4]
    assert sweep(lambda lr: -lr) == [0.8, 1.6, 0.4, 0.2, 0.1]
    assert sweep(lambda lr: -abs(lr - 3), trials=7) == [0.8, 1.6, 0.4, 3.2, 6.4, 4.53, 2.26]
    assert sweep(lambda lr: 0) == [0.8, 1.6, 0.4, 0.2, 0.1]  # of equals the smallest
    assert sweep(lambda lr: -abs(lr - 1.1), trials=9) == [0.8, 1.6, 0.4, 1.13, 0.566]  # nothing is left beside it
    assert [len(sweep(lambda lr: lr, trials)) for trials in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert next_trials(0.8, {}, 5) == [0.8, 1.6, 0.4]  # at once
    assert next_trials(0.8, {1.6: 90.0, 0.4: 80.0}, 5) == [0.8]
    assert next_trials(0.8, {0.8: 95.0, 1.6: 90.0, 0.4: 80.0, 1.13: 99.0}, 5) == [
        0.566
    ]  # as if both were tried at once


def test_sweeps_start_by_one_rule(module):
    start_lr = module("plan").start_lr
    assert [start_lr(name, 256) for name in ("SGD", "LARS", "LAMB")] == [0.2, 6, 0.006]
    assert [start_lr(name, 16384) for name in ("SGD", "LARS", "LAMB")] == pytest.approx([1.6, 48, 0.048])


def test_all_that_are_tuned_are_tuned_alike(module):
    plan, recipe = module("plan"), module("training").Recipe("")
    wanted = plan.Plan()
    peaks = {"SGD": 0.37, "LARS": 20.0, "LAMB": 0.003}
    done = carried_out(plan, wanted, recipe, lambda run: -abs(run.lr / peaks[run.optimizer] - 1))
    for optimizer, batch in product(peaks, wanted.batches):
        assert len(plan.tried(done, optimizer, batch)) == 5
        assert all(run.seed == 0 for run in done if run.tested_on == "held-out")
        chosen = plan.best_lr(plan.tried(done, optimizer, batch))
        finals = [run for run in done if run[:3] == ("test", optimizer, batch)]
        assert sorted(run.seed for run in finals if run.lr == chosen) == [0, 1, 2]
        others = {run.lr for run in finals} - {chosen}
        assert len(others) == (optimizer == "SGD" and batch != 256)  # linear scaling
    assert plan.best_lr(plan.tried(done, "SGD", 256)) == 0.4  # of 0.2, 0.4, 0.8, 0.566 and 0.283
    linear = plan.ARMS["SGD, linear scaling"]
    assert [plan.lr_of(linear, batch, 256, done) for batch in (256, 16384)] == [0.4, 25.6]
    tuned = plan.ARMS["SGD, tuned"]
    assert plan.lr_of(tuned, 16384, 256, done) == 0.4  # of 1.6, 3.2, 0.8, 0.4 and 0.2
    for workers in (4, 40):
        again = carried_out(plan, wanted, recipe, lambda run: -abs(run.lr / peaks[run.optimizer] - 1), workers)
        assert again == done
    assert len(done) == 3 * 5 * 5 + 4 * 5 * 3 - 3  # at batch 256 both SGD arms share their runs


def test_the_most_informative_come_first(module):
    plan, recipe = module("plan"), module("training").Recipe("")
    runs = list(carried_out(plan, plan.Plan(), recipe, lambda run: -run.lr))
    assert [run.tested_on for run in runs[:6]] == ["held-out"] * 5 + ["test"]
    assert {(run.optimizer, run.batch) for run in runs[:6]} == {("LARS", 16384)}
    extremes = [run for run in runs if run.batch in (16384, 256)]
    assert runs[: len(extremes)] == extremes
    seeds = [run.seed for run in extremes if run.tested_on == "test"]
    assert seeds == [0] * 7 + [1, 1, 1, 1, 2, 2, 2, 2] + [1] * 3 + [2] * 3


def test_a_small_plan_grows_into_the_whole_one(module):
    plan, recipe = module("plan"), module("training").Recipe("")
    small = plan.Plan((16384, 256), trials=4, seeds=1, arms=list(plan.ARMS)[:3])

    def accuracy(run):
        return -abs(run.lr - 1)

    begun = carried_out(plan, small, recipe, accuracy, workers=4)
    assert len(begun) == 4 * 4 + 5
    whole = carried_out(plan, plan.Plan(), recipe, accuracy, workers=4, done=begun)
    assert whole.keys() >= begun.keys()
    assert whole.keys() >= carried_out(plan, plan.Plan(), recipe, accuracy).keys()


# --- Data -------------------------------------------------------------------------------------------------------------


def test_batches_are_full_and_see_every_image_as_often(module):
    def draw(seed):
        return list(module("data").batches(10, 4, 6, torch.Generator().manual_seed(seed)))

    found = draw(0)
    assert [len(batch) for batch in found] == [4] * 6
    assert torch.cat(found)[:10].sort().values.tolist() == list(range(10))
    assert torch.cat(found)[10:20].sort().values.tolist() == list(range(10))
    assert torch.equal(torch.cat(found), torch.cat(draw(0)))
    assert not torch.equal(torch.cat(found), torch.cat(draw(1)))
    (more,) = module("data").batches(10, 25, 1, torch.Generator())
    assert set(more.bincount().tolist()) <= {2, 3}


def test_a_step_has_parts_of_its_batch(module, small):
    data = module("data").Resident(small, torch.device("cpu"))

    def sizes(batch, microbatch):
        steps = data.training_steps(batch, 5, torch.Generator().manual_seed(0), microbatch)
        return [[len(images) for images, labels in parts if len(images) == len(labels)] for parts in steps]

    assert sizes(64, 64) == sizes(64, 128) == sizes(64, 150) == sizes(64, 1000) == [[64]] * 5
    assert sizes(100, 64) == [[64, 36]] * 5
    assert sizes(700, 300) == [[300, 300, 100]] * 5
    steps = data.training_steps(160, 4, torch.Generator(), 320)
    found = torch.cat([labels for parts in steps for _, labels in parts])
    assert torch.equal(found.bincount(), data.labels.bincount())  # one epoch


def test_augmentation_crops_and_mirrors_by_seed(module, small):
    data = module("data").Resident(small, torch.device("cpu"))
    index = torch.arange(40)

    def draw(seed, **options):
        return data.train_batch(index, torch.Generator().manual_seed(seed), **options)

    images, labels = draw(0)
    assert images.shape == (40, 3, 8, 8)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == small.train_labels[:40].tolist()
    assert torch.equal(images, draw(0)[0])
    assert not torch.equal(images, draw(1)[0])
    places = set()
    for image, padded in zip(images, data.standardised(data.padded[:40]), strict=True):
        windows = {
            (row, column, mirror): padded[:, row : row + 8, column : column + 8].flip([2] * mirror)
            for row, column, mirror in product(range(9), range(9), range(2))
        }
        places.update(place for place, window in windows.items() if torch.equal(image, window))
    assert len(places) > 20
    assert {mirror for *_, mirror in places} == {0, 1}
    hidden = draw(0, cutout=3)[0]
    assert ((hidden == 0).sum((1, 2, 3)) == 27).all()
    assert torch.equal(hidden[hidden != 0], images[hidden != 0])


def test_the_test_set_is_taken_as_it_is(module, small):
    data = module("data").Resident(small, torch.device("cpu"))
    images, labels = (torch.cat(parts) for parts in zip(*data.test_batches(64), strict=True))
    mean, std = small.train_images.mean((0, 1, 2)), small.train_images.std((0, 1, 2))
    expected = (small.test_images - mean) / std
    torch.testing.assert_close(images.permute(0, 2, 3, 1).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == small.test_labels.tolist()


def test_held_out_images_are_of_the_training_set_and_not_trained_on(module, small):
    held = small.held_out()
    assert (len(held.train_labels), len(held.test_labels)) == (576, 64)
    rows = {image.tobytes() for image in held.train_images} | {image.tobytes() for image in held.test_images}
    assert rows == {image.tobytes() for image in small.train_images}
    assert len(rows) == 640
    assert (held.test_images == small.held_out().test_images).all()


def test_data_may_come_in_any_of_its_forms(module, tmp_path, capsys):
    data = module("data")
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (60, 3072), dtype=np.uint8), random.integers(0, 10, 60)
    folder = tmp_path / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*data.BATCHES, "test_batch"]):
        part = slice(10 * number, 10 * number + 10)
        content = {b"data": pixels[part], b"labels": labels[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    found = data.load(tmp_path / "root")
    assert found.train_images.shape == (50, 32, 32, 3)
    assert found.test_images[3, 5, 7].tolist() == pixels[53].reshape(3, 32, 32)[:, 5, 7].tolist()
    assert found.train_labels.tolist() == labels[:50].tolist()
    with pytest.raises(SystemExit, match="0"):
        module("main").main(["--data", str(folder), "--prepare", str(tmp_path / "prepared.npz")])
    prepared = data.load(tmp_path / "prepared.npz")
    assert all((ours == theirs).all() for ours, theirs in zip(prepared, found, strict=True))
    assert prepared.fingerprint() == found.fingerprint() != data.synthetic().fingerprint()
    with pytest.raises(SystemExit, match="2"):
        module("main").main(["--data", str(tmp_path), "--device", "cpu"])
    assert "--data must be an .npz, or a folder that holds cifar-10-batches-py (got: " in capsys.readouterr().err


def test_data_may_be_jpegs(module, monkeypatch, tmp_path):
    image = pytest.importorskip("PIL.Image")
    data, arrays = module("data"), {}
    whole = data.synthetic(train=30, test=20, size=32)
    for part in ("train", "test"):
        files = []
        for number, label in enumerate(getattr(whole, f"{part}_labels")):
            flat = np.full((32, 32, 3), 20 * label, dtype=np.uint8)
            image.fromarray(flat).save(tmp_path / f"{number}.jpg")
            files.append((tmp_path / f"{number}.jpg").read_bytes())
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = getattr(whole, f"{part}_labels")
    np.savez(tmp_path / "jpeg.npz", **arrays)
    monkeypatch.setattr(data, "CHUNK", 7)
    with ThreadPoolExecutor(3) as pool:
        found = data.load(tmp_path / "jpeg.npz", pool.map)
    assert found.train_images.shape == (30, 32, 32, 3)
    assert found.test_images.shape == (20, 32, 32, 3)
    off = found.train_images.astype(int) - 20 * found.train_labels[:, None, None, None].astype(int)
    assert abs(off).max() <= 2
    assert found.fingerprint() == whole.fingerprint()


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "lr"), [("SGD", 0.4), ("LARS", 8), ("LAMB", 0.02)])
def test_it_learns(module, extension, small, device, optimizer, lr):
    training = module("training")
    recipe = training.Recipe("", epochs=5, warmup=1, width=8, dtype="float32")
    data = module("data").Resident(small, device)
    found = training.train(training.Run("test", optimizer, 32, lr, 0), recipe, data, device)
    assert [round(seen * 640 / 32) for seen, *_ in found["curve"]] == [
        math.ceil(evaluation * 100 / 12) for evaluation in range(1, 13)
    ]
    assert found["curve"][-1][1] < found["curve"][0][1]
    assert found["curve"][-1][2] > (80 if device.type == "cpu" else 70)  # a GPU varies from run to run


@pytest.mark.parametrize(("microbatch", "batch"), [(64, 128), (256, 64)])
@pytest.mark.parametrize(("optimizer", "lr"), [("SGD", 0.1), ("LARS", 2), ("LAMB", 0.005)])
def test_a_run_captured_on_cuda_begins_as_an_eager_one(module, cuda, small, optimizer, lr, microbatch, batch):
    training = module("training")
    recipe = training.Recipe("", epochs=3, warmup=1, width=8, microbatch=microbatch, dtype="float32")
    data = module("data").Resident(small, cuda)
    run = training.Run("test", optimizer, batch, lr, 0)
    eager, captured = (training.train(run, recipe, data, cuda, graph=graph)["curve"] for graph in (False, True))
    for (seen, loss, _), (also_seen, other, _) in zip(eager[:4], captured[:4], strict=True):
        assert (also_seen, other) == (seen, pytest.approx(loss, rel=0.02))


def test_a_run_is_decided_by_its_seed(module, extension, small):
    training, device = module("training"), torch.device("cpu")
    recipe = training.Recipe("", epochs=1, warmup=0.25, width=2, microbatch=64, dtype="bfloat16")
    data = module("data").Resident(small, device)
    runs = [training.Run("test", "LARS", 160, 8.0, seed) for seed in (0, 0, 1)]
    first, again, other = (training.train(run, recipe, data, device)["curve"] for run in runs)
    assert first == again != other


def test_a_run_that_diverges_ends_and_can_be_written(module, extension, small):
    training, device = module("training"), torch.device("cpu")
    recipe = training.Recipe("", epochs=9, warmup=0.25, width=2, dtype="float32")
    data = module("data").Resident(small, device)
    found = training.train(training.Run("test", "SGD", 160, 1e30, 0), recipe, data, device)
    assert found["diverged"]
    assert len(found["curve"]) < 9
    assert found["curve"][-1][1] is None
    json.dumps(found, allow_nan=False)


def test_all_arms_run_stop_and_go_on(main, module, tmp_path, capsys):
    records = main()
    runs = [tuple(record["run"].values()) for record in records]
    assert len(runs) == len(set(runs)) == 3 * 2 * 3 + 4 * 2 * 3 - 2
    assert {record["steps"] for record in records if record["run"]["batch"] == 640} == {1}
    assert {"torch", "torchlars", "cpu"} <= records[0]["environment"].keys()
    out = capsys.readouterr().out
    assert "all runs are there" in out
    results = tmp_path / "runs.jsonl"
    text = results.read_text(encoding="utf-8")
    main()  # nothing is left
    assert results.read_text(encoding="utf-8") == text
    results.write_text(text[:-10], encoding="utf-8")  # the last one was cut off
    again = main()
    assert [record["run"] for record in again] == [record["run"] for record in records]
    with pytest.raises(SystemExit):
        main("--epochs", "2")
    assert "holds runs of another recipe (epochs: 1.0 there, 2.0 here)" in capsys.readouterr().err

    pytest.importorskip("matplotlib")
    module("report").main(["--results", str(results)])
    assert (tmp_path / "runs.png").stat().st_size > 10_000
    table = (tmp_path / "runs.md").read_text(encoding="utf-8").splitlines()
    for batch, arm in product((80, 320, 640), module("plan").ARMS):
        (row,) = [line for line in table if line.startswith(f"| {batch} ") and f"| {arm} " in line]
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[3:6] == ["0.5", "1", str(640 // batch)]
        assert cells[-1] == "2"
    results.write_text(text.splitlines(keepends=True)[0], encoding="utf-8")  # no run on the test set yet
    module("report").main(["--results", str(results)])


def test_time_that_is_up_is_said(main, module, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 20))  # read twice a run
    monkeypatch.setattr(module("main"), "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    records = main("--minutes", "2")
    assert len(records) == 3
    assert "time is up before SGD, batch 640, lr 0.316, seed 0, on the held-out set" in capsys.readouterr().out
    assert len(main("--minutes", "2")) > 3


def test_runs_may_be_carried_out_side_by_side(main, module, tmp_path, capsys):
    small = ["--batches", "320", "80", "--arms", "LARS, tuned", "SGD, linear scaling", "--seeds", "1"]
    alone = main(*small)
    (tmp_path / "runs.jsonl").unlink()
    records = main(*small, "--workers", "2")
    assert "all runs are there" in capsys.readouterr().out
    assert {record["environment"]["workers"] for record in records} == {2}

    def curves(records):
        return {tuple(record["run"].values()): record["curve"] for record in records}

    assert curves(records).keys() == curves(alone).keys()
    for run, curve in curves(records).items():
        for point, other in zip(curve, curves(alone)[run], strict=True):
            assert point[:2] == pytest.approx(other[:2], rel=1e-3)  # threads add up in another order


def test_what_is_over_outlives_a_kill_and_the_workers_do_not(tmp_path, extension):
    results = tmp_path / "runs.jsonl"
    command = [sys.executable, "-m", "benchmarks.cifar10_accuracy.main", *TINY, "--results", str(results)]
    command += ["--workers", "2", "--seeds", "9999"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        lines = list(itertools.takewhile(lambda line: b" min " not in line, process.stdout))
        process.kill()
        process.communicate(timeout=60)  # the workers hold the other end of the pipe, too
    assert results.exists(), b"".join(lines).decode()
    assert results.read_text(encoding="utf-8").count("\n") >= 1


def test_the_reference_is_not_run_in_the_name_of_torchlars(module, monkeypatch, capsys):
    monkeypatch.setattr(module("main").common._extension, "extension", None)
    with pytest.raises(SystemExit):
        module("main").main(["--synthetic"])
    assert "torchlars has no extension in" in capsys.readouterr().err


def test_a_graph_needs_a_gpu(main, capsys):
    with pytest.raises(SystemExit):
        main("--graph")
    assert "--graph needs --device cuda (got: cpu)" in capsys.readouterr().err


def test_table_worked_by_hand(module):
    training, report = module("training"), module("report")
    recipe, done = training.Recipe("", base_batch=256), {}

    def add(tested_on, optimizer, batch, lr, seed, *accuracies):
        curve = [[epoch, 1.0, accuracy] for epoch, accuracy in enumerate(accuracies, start=1)]
        run = training.Run(tested_on, optimizer, batch, lr, seed)
        done[run] = {"curve": curve, "diverged": False, "steps": 73, "seconds": 60.0, "environment": {"torch": "2"}}

    add("held-out", "SGD", 256, 0.1, 0, 90)
    add("held-out", "SGD", 256, 0.2, 0, 80)
    add("held-out", "LARS", 16384, 16, 0, 80)
    add("held-out", "LARS", 16384, 32, 0, 91)
    add("held-out", "LARS", 16384, 64, 0, 85)
    add("test", "SGD", 16384, 6.4, 0, 50, 40)  # 0.1 · 64
    add("test", "LARS", 16384, 32, 0, 91, 90)
    add("test", "LARS", 16384, 32, 1, 92, 92)
    add("test", "LARS", 16384, 16, 1, 99, 99)  # of an lr that was not chosen
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.tables(done, recipe).splitlines()]
    assert rows[2] == ["16384", "LARS, tuned", "32", "10", "60", "73", "91.50 ± 0.71 %", "91.00 ± 1.41 %", "2"]
    assert rows[3] == ["16384", "SGD, linear scaling", "6.4", "10", "60", "73", "50.00 %", "40.00 %", "1"]
    assert ["256", "SGD", "**0.1: 90.00**, 0.2: 80.00", "no"] in rows
    assert ["16384", "LARS", "16: 80.00, **32: 91.00**, 64: 85.00", "yes"] in rows
    assert "9 runs, whose times add up to 9.0 minutes." in report.tables(done, recipe)
