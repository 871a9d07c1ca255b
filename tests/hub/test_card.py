"""Laws of a model card: its metadata is the Hub's, what is known is told, and what is unknown is left out."""

import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import ptq4vm
from ptq4vm.formatting import model_bytes
from ptq4vm.hub.card import Card
from ptq4vm.hub.metrics import read_metrics
from ptq4vm.hub.names import HubName
from ptq4vm.models import create_model

METRICS = {"top1": 75.5, "float_top1": 76.25, "agreement": 90, "dataset": "my digits", "split": "test", "images": 1500}
KNOWN = {"base_model": "hustvl/Vim", "dataset": "imagenet-1k", "licence": "Apache-2.0"}


def card(quantized, metrics=None, **known) -> ModelCard:
    made = Card(
        name=HubName("org/some-name"), quantized=quantized, file_bytes=3 * 2**20, metrics=read_metrics(metrics), **known
    )
    return ModelCard(made.text())


def facts(text: str) -> dict[str, str]:
    """Returns the rows of the table of facts."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_all_that_is_known_is_told(vim):
    found = card(vim, METRICS, **KNOWN)
    said = facts(found.text)
    assert said["Base model"].startswith("[hustvl/Vim](") and said["Licence"] == "Apache-2.0"
    assert said["Architecture"] == "`vim_nano_patch4_32`, as timm names it"
    assert said["Recipe"] == "minmax4" and said["Weights"] == "4 bits, per channel"
    assert said["Quantized"].startswith("6 of 7 products of weights (")
    assert said["Calibrated with images of"] == "imagenet-1k" and said["Inputs"] == "batch×3×32×32"
    size = model_bytes(create_model("vim_nano_patch4_32", depth=1, num_classes=7)) / 2**20
    assert said["Size"] == f"3.00 MiB, in FP32 {size:.2f} MiB"
    assert "Measured on my digits, test split, 1,500 images." in found.text
    assert "| Top-1 accuracy (%) | 75.5 | 76.25 |" in found.text


def test_the_metadata_are_the_hubs(vim):
    data = card(vim, METRICS, **KNOWN).data
    assert (data.library_name, data.license, data.base_model) == ("ptq4vm", "apache-2.0", "hustvl/Vim")
    assert data.datasets == ["imagenet-1k"] and data.pipeline_tag == "image-classification"
    assert {"ptq4vm", "quantized", "w4a4", "mamba"} <= set(data.tags)
    (result,) = data.eval_results  # agreement is a figure of two models
    assert (result.metric_type, result.metric_value, result.task_type) == ("accuracy", 75.5, "image-classification")
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("my-digits", "my digits", "test")
    assert data.model_name == "some-name"


def test_what_is_unknown_is_left_out(plain):
    found = card(plain)
    said = facts(found.text)
    unknown = {"Base model", "Architecture", "Recipe", "Calibrated with images of", "Licence", "Learning"}
    assert not unknown & said.keys() and said["Size"] == "3.00 MiB"
    assert said["Weight rounding"] == "GPTQ" and said["Inputs"] == "batch×5×8"
    assert "Accuracy" not in found.text and "None" not in found.content
    data = yaml.safe_load(found.content.split("---\n")[1])
    assert data.keys() == {"library_name", "tags"} and "mamba" not in data["tags"]


def test_figures_without_a_dataset_are_told_but_are_no_results(vim):
    found = card(vim, {"top1": 75.5})
    assert "| Top-1 accuracy (%) | 75.5 |  |" in found.text and found.data.eval_results is None
    assert "Measured on" not in found.text


def test_other_tasks_are_results_where_they_are_named(plain):
    known = {"mAP": 41.5, "float_mAP": 42, "dataset": "coco"}
    assert card(plain, known).data.eval_results is None
    (result,) = card(plain, known | {"task": "object-detection"}).data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("object-detection", "mAP", 41.5)


def test_names_that_are_no_repositories_are_text_alone(plain):
    found = card(plain, base_model="my own Vim", dataset="our photographs of 2025")
    assert facts(found.text)["Base model"] == "my own Vim"
    assert facts(found.text)["Calibrated with images of"] == "our photographs of 2025"
    assert found.data.base_model is None and found.data.datasets is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [("org/set.v1", "org/set.v1"), ("/data/my set", "data-my-set"), ("a/b/c", "a-b-c"), ("数", "unknown")],
)
def test_results_have_a_dataset_that_the_hub_takes(vim, name, kind):
    (result,) = card(vim, {"top1": 75.5, "dataset": name}).data.eval_results
    assert (result.dataset_type, result.dataset_name) == (kind, name)


def test_text_stays_in_its_cell(plain):
    found = card(plain, base_model="a|b\n# c", dataset="d")
    assert "a\\|b # c" in found.text


@pytest.mark.parametrize("name", ["vim", "plain"])
def test_the_snippet_runs(name, request, tmp_path):
    quantized = request.getfixturevalue(name)
    ptq4vm.save(quantized, tmp_path / "model")
    code = card(quantized).text.split("```python\n")[1].split("```")[0]
    assert 'ptq4vm.load("hf-hub:org/some-name")' in code
    code = code.replace("hf-hub:org/some-name", str(tmp_path / "model")) + "\nprint(tuple(outputs.shape))"
    Image.new("RGB", (40, 50)).save(tmp_path / "picture.jpg")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "(1, 7)\n" if name == "vim" else "(1, 5, 4)\n"), done.stderr
