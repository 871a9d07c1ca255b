"""benchmarks/accuracy.py, the experiment runner."""

import itertools
import json
import sys

import pytest

from benchmarks import accuracy, accuracy_tables
from benchmarks.recipes import ABLATIONS, config_of
from ptq4vm.config import QuantConfig
from ptq4vm.formatting import table
from ptq4vm.recipes import RECIPES


def options(*words: str):
    return accuracy.parser().parse_args(["run", "--data-dir", "digits", *words])


def row(**changes):
    numbers = dict.fromkeys(("top1", "loss", "agreement", "divergence", "block_cosine", "calibrate_s", "bytes"), 1.0)
    facts = {"model": "m", "variant": "plain", "bits": 4, "recipe": "pts", "seed": 0, "images": 8, "epochs": None}
    return facts | numbers | changes


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_the_best_recipe(name):
    assert config_of(name, 4, 0, None) != QuantConfig.recipe("best", 4)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_packages_but_for_its_epochs(name):
    assert config_of(name, 6, 2, None) == QuantConfig.recipe(name, 6, seed=2)
    learning = config_of(name, 6, 2, 3).learning
    assert learning is None or learning.epochs == 3


def test_what_an_interrupted_write_leaves_is_no_row_and_hides_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    accuracy.append(path, row(seed=0))
    with path.open("a") as file:
        file.write('{"model": "m", "to')
    assert accuracy.read(path) == [row(seed=0)]
    accuracy.append(path, row(seed=1))
    assert accuracy.read(path) == [row(seed=0), row(seed=1)]


def test_shares_are_the_whole_and_share_nothing():
    whole = list(accuracy.wanted(options()))
    shares = [list(accuracy.wanted(options("--share", f"{i}/3"))) for i in range(3)]
    assert sorted(map(str, itertools.chain(*shares))) == sorted(map(str, whole))
    assert len({str(row) for row in whole}) == len(whole)


@pytest.mark.parametrize("share", ["3/3", "1", "a/b", "-1/2"])
def test_a_share_that_makes_no_sense_is_refused(share):
    with pytest.raises(ValueError, match=f"--share must be i/n with 0 <= i < n, got '{share}'"):
        list(accuracy.wanted(options(f"--share={share}")))


def test_the_table_has_means_and_half_the_range_over_the_seeds():
    rows = [row(seed=seed, loss=loss) for seed, loss in enumerate((1.0, 2.0, 6.0))]
    (summary,) = accuracy_tables.summary(rows)
    assert (summary["seeds"], summary["loss"], summary["spread"]) == (3, 3.0, 2.5)
    assert len(accuracy_tables.summary([*rows, row(recipe="best")])) == 2
    others = [row(seed=seed, model="n", recipe="best") for seed in range(3)]
    assert accuracy_tables.markdown([*rows, *others, row(bits=8)]).splitlines() == [
        "| W8A8, plain | m | n |",
        "| --- | --- | --- |",
        "| `pts` | **1.00** · 1.0 · 1000.0¹ | – |",
        "",
        "| W4A4, plain | m | n |",
        "| --- | --- | --- |",
        "| `pts` | **3.00 ± 2.50** · 1.0 · 1000.0 | – |",
        "| `best` | – | **1.00 ± 0.00** · 1.0 · 1000.0 |",
    ]


def test_rows_that_learned_for_other_times_are_told_apart():
    rows = [row(recipe="ptq4vm", epochs=epochs, loss=float(epochs)) for epochs in (100, 20)]
    assert accuracy_tables.markdown([*rows, row()]).splitlines()[2:] == [
        "| `pts` | **1.00** · 1.0 · 1000.0¹ |",
        "| `ptq4vm, 100 epochs` | **100.00** · 1.0 · 1000.0¹ |",
        "| `ptq4vm, 20 epochs` | **20.00** · 1.0 · 1000.0¹ |",
    ]


def test_rows_of_other_test_images_are_told_apart():
    rows = [row(test_images=images, loss=float(images)) for images in (10, 20)]
    assert accuracy_tables.markdown([*rows, row()]).splitlines()[2:] == [
        "| `pts, 10 test images` | **10.00** · 1.0 · 1000.0¹ |",
        "| `pts, 20 test images` | **20.00** · 1.0 · 1000.0¹ |",
        "| `pts, None test images` | **1.00** · 1.0 · 1000.0¹ |",
    ]
    best = [row(recipe="best", seed=seed, test_images=10) for seed in range(3)]
    less = [row(recipe="best-gptq", seed=seed, test_images=20) for seed in range(3)]
    assert accuracy_tables.differences([*best, *less]) == {}


@pytest.mark.parametrize("name", ["accuracy", "kscaled"])
def test_rows_of_earlier_commits_stay_readable(name):
    rows = accuracy.read(accuracy.RESULTS.with_name(f"{name}.jsonl"))
    assert len({accuracy.key_of(row) for row in rows}) == len(rows) > 100
    assert table(accuracy_tables.summary(rows), accuracy_tables.COLUMNS) and accuracy_tables.markdown(rows)


def test_a_row_says_where_it_comes_from(monkeypatch):
    origin = accuracy.origin()
    assert list(origin) == ["commit", "torch", "kernels"] and all(origin.values())
    assert accuracy.re.fullmatch(r"[0-9a-f]{12}\+?|unknown\+?", origin["commit"])
    monkeypatch.setattr(accuracy.subprocess, "run", lambda *args, **options: (_ for _ in ()).throw(FileNotFoundError()))
    assert accuracy.commit() == "unknown"


@pytest.mark.parametrize(("test_images", "found"), [(None, 450), (100, 100), (9999, 450)])
def test_a_row_of_other_test_images_is_measured_again(tmp_path, monkeypatch, test_images, found):
    pytest.importorskip("sklearn")
    path = tmp_path / "rows.jsonl"
    measured = []
    monkeypatch.setattr(accuracy, "subject_of", lambda *arguments: None)
    monkeypatch.setattr(accuracy, "measured", lambda subject, config, images: measured.append(images) or {})
    words = ["--models", "m", "--variants", "plain", "--bits", "4", "--recipes", "pts", "--seeds", "1", "--images", "8"]
    chosen = options(*words, "--output", str(path))
    chosen.test_images = test_images
    accuracy.append(path, row(test_images=77) | {"epochs": None})
    for _ in range(2):
        accuracy.run(chosen)
    assert measured == [8] and accuracy.read(path)[-1]["test_images"] == found


def test_a_stage_is_worth_what_its_lack_adds_seed_by_seed():
    best = [row(recipe="best", seed=seed, divergence=0.01 * seed) for seed in range(3)]
    less = [row(recipe="best-gptq", seed=seed, divergence=0.01 * seed + 0.001 * (seed + 1)) for seed in range(3)]
    fewer = [row(recipe="best-mirror", seed=seed) for seed in range(2)]
    assert accuracy_tables.differences([*best, *less, *fewer]) == {("best-gptq", "m"): "+2.0 (+1.0 … +3.0)"}
    assert accuracy_tables.markdown([*best, *less]).splitlines()[-3:] == [
        "| W4A4, plain: KL · 1000 more without it | m |",
        "| --- | --- |",
        "| `best-gptq` | +2.0 (+1.0 … +3.0) |",
    ]


def test_of_several_times_of_learning_the_shortest_is_drawn():
    rows = [row(epochs=epochs, bits=bits) for epochs, bits in ((100, 4), (20, 4), (10, 8))]
    assert [(key, value["epochs"]) for key, value in accuracy_tables.drawn(rows).items()] == [
        (("plain", "m", "pts"), 20)
    ]


def test_the_picture_shows_what_there_is(tmp_path):
    rows = [
        row(recipe=recipe, seed=seed, variant=variant)
        for recipe in ("pts", "best")
        for seed in range(3)
        for variant in ("plain", "hard")
    ]
    accuracy_tables.draw([*rows, row(bits=8)], tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_writes_rows_and_does_none_twice(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    path = tmp_path / "rows.jsonl"
    words = ["accuracy", "run", "--data-dir", "digits", "--models", "vmamba_nano_32", "--variants", "hard"]
    words += ["--bits", "4", "--recipes", "minmax", "best", "--seeds", "1", "--images", "16", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--test-images", "100", "--output", str(path)])
    accuracy.main()
    first = path.read_text()
    minmax, best = (json.loads(line) for line in first.splitlines())
    assert minmax["date"] and minmax["commit"] == accuracy.commit() and minmax["torch"] and minmax["kernels"]
    assert (minmax["recipe"], best["recipe"]) == ("minmax", "best") and minmax["test_images"] == 100
    assert best["agreement"] > minmax["agreement"] and best["block_cosine"] < minmax["block_cosine"]
    monkeypatch.setattr(accuracy, "measured", None)
    accuracy.main()
    assert path.read_text() == first
    assert "vmamba_nano_32" in capsys.readouterr().out
