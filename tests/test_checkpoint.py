import json
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from public_models import slow_but
from safetensors.torch import load_file
from strategies import EVERYTHING, normal
from torch import nn

import ptq4vm
import ptq4vm.models  # adds vim_* to timm's registry
from ptq4vm import Granularity, Learning, QuantConfig, convert, load, save
from ptq4vm import checkpoint as module
from ptq4vm.checkpoint import CheckpointError
from ptq4vm.record import record_of

CONFIGS = {
    "w8a8": QuantConfig(),
    "w4a4": QuantConfig.w4a4(learning=Learning(epochs=1)),
    "w3a5 unsmoothed": QuantConfig(weight_bits=3, activation_bits=5, smoothing=None),
    "per tensor": QuantConfig.smoothquant(8),
    "dynamic": QuantConfig(granularity=Granularity.PER_TOKEN_DYNAMIC, range_search=False),
    "excluded": QuantConfig.w4a4(learning=None, exclude=("layers.1.*",)),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("name", slow_but(("w4a4", "per tensor", "everything"), CONFIGS))
def test_a_loaded_model_is_the_saved_one(roads, small_vim, images, tmp_path, name):
    quantized = convert(roads.calibrated(CONFIGS[name]))
    assert save(quantized, tmp_path / "model") == tmp_path / "model"
    loaded = load(tmp_path / "model", model=small_vim)
    for count in (1, 12):
        assert torch.equal(loaded(images[:count]), quantized(images[:count]))
    assert record_of(loaded).config == CONFIGS[name]
    assert record_of(loaded).linears == record_of(quantized).linears
    assert not any(value.requires_grad for value in loaded.parameters())


def test_the_weights_of_the_given_model_do_not_matter(roads, images, saved):
    torch.manual_seed(5)
    other = ptq4vm.models.Vim(img_size=16, patch_size=4, embed_dim=32, depth=2, state=4, num_classes=10)
    assert torch.equal(load(saved, model=other)(images), convert(roads.calibrated(CONFIGS["w4a4"]))(images))


def test_saving_what_was_loaded_gives_the_same_bytes(saved, small_vim, tmp_path):
    save(load(saved, model=small_vim), tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


NANO = {"depth": 1, "num_classes": 7}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (32, 32)), ({"img_size": (16, 32), "in_chans": 1}, (16, 32))],
    ids=str,
)
def test_a_model_that_timm_knows_is_built_from_its_name(tmp_path, options, size):
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", num_classes=7, **options)
    x = normal(2, options.get("in_chans", 3), *size)
    quantized = ptq4vm.quantize(model, [x], QuantConfig(), progress=False)
    loaded = load(save(quantized, tmp_path / "model"))
    assert torch.equal(loaded(x), quantized(x)) and loaded(x).shape == (2, 7)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == "vim_nano_patch4_32" and config["num_classes"] == 7
    assert config["pretrained_cfg"]["input_size"] == [options.get("in_chans", 3), *size]


def test_our_models_are_built_again_as_they_were_asked_for(tmp_path):
    """timm's name does not tell the depth; config.json does."""
    model = timm.create_model("vim_nano_patch4_32", **NANO)
    x = normal(2, 3, 32, 32)
    quantized = ptq4vm.quantize(model, [x], QuantConfig(), progress=False)
    save(quantized, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(x), quantized(x))


@pytest.mark.slow
def test_a_model_that_timm_makes_otherwise_is_refused_but_not_confused(tmp_path):
    """Of timm's own models only the name is known: without the model itself the tensors do not fit."""
    model = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=32, num_classes=10).eval()
    x = normal(2, 3, 32, 32)
    quantized = ptq4vm.quantize(model, [x], QuantConfig(), progress=False)
    save(quantized, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"tensors do not fit .*code or arguments differ"):
        load(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model", model=model)(x), quantized(x))


def test_four_bit_weights_take_half_a_byte(roads, tmp_path):
    tensors = {}
    for name in ("w4a4", "w8a8"):
        save(convert(roads.calibrated(CONFIGS[name])), tmp_path / name)
        found = load_file(tmp_path / name / "model.safetensors")
        tensors[name] = sum(value.nbytes for key, value in found.items() if key.endswith(".weight_q"))
    assert tensors["w4a4"] == tensors["w8a8"] / 2


# --- what is written ---


@pytest.fixture
def saved(roads, tmp_path):
    return save(convert(roads.calibrated(CONFIGS["w4a4"])), tmp_path / "model")


def test_the_folder_holds_two_files_and_no_pickle(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "ptq4vm" and config["format_version"] == 1
    assert config["weight_bits"] == 4 and config["granularity"] == "per_token"
    assert [linear["tokens"] for linear in config["linears"]] == [17] * 12


def test_loading_never_unpickles(saved, small_vim, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    load(saved, model=small_vim)


def test_a_quantized_model_is_replaced_by_the_next(roads, images, small_vim, saved):
    quantized = convert(roads.calibrated(CONFIGS["w8a8"]))
    save(quantized, saved)
    assert torch.equal(load(saved, model=small_vim)(images), quantized(images))
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_an_empty_folder_and_missing_parents_are_no_obstacle(roads, tmp_path):
    (tmp_path / "empty").mkdir()
    quantized = convert(roads.calibrated(CONFIGS["w4a4"]))
    assert (save(quantized, tmp_path / "empty") / "config.json").is_file()
    assert (save(quantized, tmp_path / "a" / "b" / "c") / "config.json").is_file()


@pytest.mark.parametrize("failing", ["_digest", "_move"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_when_saving_fails_the_old_model_stays(roads, saved, monkeypatch, failing, error):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(type(error)):
        save(convert(roads.calibrated(CONFIGS["w8a8"])), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_when_the_last_rename_fails_the_old_model_stays(roads, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    replace = module.os.replace

    def fail(source, target):
        if target == saved and str(source).endswith(".tmp"):
            raise OSError("gone")
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="gone"):
        save(convert(roads.calibrated(CONFIGS["w8a8"])), saved)
    assert saved.is_dir() and {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_folder_of_something_else_is_not_replaced(roads, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="exists and holds no quantized model; choose another folder"):
        save(convert(roads.calibrated(CONFIGS["w4a4"])), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("config", ["{}", '{"architecture": "resnet50", "num_classes": 1000}', "not json"])
def test_another_models_config_does_not_make_it_ours(roads, tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="holds no quantized model"):
        save(convert(roads.calibrated(CONFIGS["w4a4"])), tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_bytes() == b"precious"


def test_notes_beside_a_saved_model_are_not_deleted(roads, saved):
    (saved / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds notes\.md, which saving would delete"):
        save(convert(roads.calibrated(CONFIGS["w4a4"])), saved)
    assert (saved / "notes.md").read_text() == "mine"


def test_a_file_in_the_way_is_an_error_and_stays(roads, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(OSError, match="model"):
        save(convert(roads.calibrated(CONFIGS["w4a4"])), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_only_lowered_models_are_saved(roads, tmp_path):
    for gm in (roads.calibrated(CONFIGS["w4a4"]), convert(roads.calibrated(CONFIGS["w4a4"]), lower=False)):
        with pytest.raises(ValueError, match=r"only lowered models are saved.*without lower=False"):
            save(gm, tmp_path / "model")
    with pytest.raises(TypeError, match="expected a graph from"):
        save(nn.Linear(2, 2), tmp_path / "model")
    assert not list(tmp_path.iterdir())


# --- what cannot be loaded ---


def edit(folder, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def refused(folder, model, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder, model=model)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("missing", ["folder", "config.json", "model.safetensors"])
def test_a_missing_file_is_an_error(saved, small_vim, missing):
    shutil.rmtree(saved) if missing == "folder" else (saved / missing).unlink()
    refused(saved, small_vim, r"is not a saved model: it has no " + ("config" if missing == "folder" else missing))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_an_error(saved, small_vim, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, small_vim, "truncated or edited; copy the folder again or quantize the model again")


@pytest.mark.parametrize("place", [0, 200, -1])
def test_one_flipped_bit_in_the_weights_is_an_error(saved, small_vim, place):
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    refused(saved, small_vim, "SHA-256 differs.*truncated or edited")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"a": 1}', "\x00\xff"])
def test_a_config_that_is_no_config_is_an_error(saved, small_vim, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    refused(saved, small_vim, r"config\.json is corrupt or not a quantized model's.*copy the folder again")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["quantization_config"].update(weight_bits=9),
        lambda config: config["quantization_config"].update(weight_bit=4),
        lambda config: config["quantization_config"].pop("linears"),
        lambda config: config["quantization_config"].update(linears=3),
        lambda config: config["quantization_config"]["linears"][0].pop("tokens"),
        lambda config: config.pop("input_shapes"),
        lambda config: config.pop("architecture"),
        lambda config: config.update(quantization_config=[]),
        lambda config: config["quantization_config"].update(blocks=None),
    ],
)
def test_an_edited_config_is_an_error(saved, small_vim, change):
    edit(saved, change)
    refused(saved, small_vim, "corrupt")


def test_an_unknown_key_is_named(saved, small_vim):
    edit(saved, lambda config: config["quantization_config"].update(weight_bit=4))
    refused(saved, small_vim, "has no key 'weight_bit'")


def test_other_bits_than_the_weights_have_are_an_error(saved, small_vim):
    edit(saved, lambda config: config["quantization_config"].update(weight_bits=8))
    refused(saved, small_vim, "tensors do not fit Vim")


@pytest.mark.parametrize("version", [2, 99, "2"])
def test_a_newer_format_is_an_error_that_says_upgrade(saved, small_vim, version):
    edit(saved, lambda config: config["quantization_config"].update(format_version=version, ptq4vm_version="9.9"))
    refused(saved, small_vim, rf"format version {version}, written by ptq4vm 9\.9.*upgrade ptq4vm")


def test_another_method_is_an_error_that_names_it(saved, small_vim):
    edit(saved, lambda config: config["quantization_config"].update(quant_method="gptq"))
    refused(saved, small_vim, "was quantized by 'gptq', not by 'ptq4vm'; load it with that package")


def test_a_model_that_timm_cannot_build_must_be_given(saved):
    refused(saved, None, r"made from a model that timm cannot build: load\(folder, model=your_model\)")


def test_a_name_that_timm_does_not_know_is_an_error(saved):
    edit(saved, lambda config: config.update(architecture="vim_colossal"))
    refused(saved, None, r"timm cannot build the model \(.*vim_colossal.*load\(folder, model=your_model\)")


def test_a_model_of_another_shape_is_an_error_that_names_tensors(saved):
    other = ptq4vm.models.Vim(img_size=16, patch_size=4, embed_dim=32, depth=3, state=4, num_classes=10)
    refused(saved, other, r"tensors do not fit Vim, first .*layers\.2\.")


@pytest.mark.slow
def test_a_fresh_process_loads_the_same_logits(tmp_path):
    torch.manual_seed(0)
    model, x = timm.create_model("vim_nano_patch4_32"), normal(2, 3, 32, 32)
    quantized = ptq4vm.quantize(model, [x], QuantConfig.w4a4(learning=None), progress=False)
    save(quantized, tmp_path / "model")
    torch.save((x, quantized(x)), tmp_path / "io.pt")
    code = (
        "import ptq4vm, sys, torch; torch.set_num_threads(int(sys.argv[2]))\n"
        "x, y = torch.load(sys.argv[1] + '/io.pt'); print(torch.equal(ptq4vm.load(sys.argv[1] + '/model')(x), y))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
