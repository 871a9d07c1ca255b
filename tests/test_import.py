"""Effects of importing, seen by a fresh process."""

import json
import subprocess
import sys

import pytest

HEAVY = ("timm", "matplotlib", "torch", "torch._inductor", "torchao", "torchvision", "triton", "sklearn", "tqdm")


def fresh(code: str, *options: str) -> object:
    """Returns what `code` prints, read as JSON; it may print nothing else, and nothing to standard error."""
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def loaded(names: tuple[str, ...]) -> str:
    return f"[name for name in {names!r} if name in sys.modules]"


def test_importing_the_package_loads_nothing():
    assert fresh(f"import json, sys, ptq4vm; print(json.dumps({loaded(HEAVY)}))", "-W", "error") == []


def test_a_config_needs_no_torch():
    code = f"import sys, ptq4vm; print(ptq4vm.QuantConfig.w4a4() and ptq4vm.Granularity and {loaded(HEAVY)})"
    assert fresh(code, "-W", "error") == []


def test_packages_are_there_without_an_import_of_their_own():
    code = "import json, ptq4vm; print(json.dumps([callable(ptq4vm.authors.stand_ins), 'authors' in dir(ptq4vm)]))"
    assert fresh(code, "-W", "error") == [True, True]


def test_a_name_that_is_not_there_is_an_attribute_error():
    code = "import json, ptq4vm\ntry: ptq4vm.quantise\nexcept AttributeError as e: print(json.dumps(str(e)))"
    assert fresh(code) == "module 'ptq4vm' has no attribute 'quantise'"


def test_the_verbs_are_there_and_leave_the_process_alone():
    code = f"""
import json, logging, sys
import ptq4vm.api
loaded = {loaded(("timm", "matplotlib", "torchvision", "sklearn"))}
import ptq4vm, torch
print(json.dumps([
    loaded,
    torch.cuda.is_initialized(),
    len(logging.getLogger("ptq4vm").handlers + logging.getLogger().handlers),
    [name for name in ptq4vm.__all__ if not callable(getattr(ptq4vm, name)) or name not in dir(ptq4vm)],
]))
"""
    assert fresh(code) == [[], False, 0, []]


@pytest.mark.slow
def test_any_module_may_be_the_first():
    code = """
import importlib, json, os, torch
first = "saving", "quantizers", "passes.prepare.pipeline", "passes.calibrate.blockwise", "passes.lower.pipeline"
failed = []
for name in first:
    child = os.fork()  # torch is loaded once, torchao by whoever needs it
    if child == 0:
        try:
            importlib.import_module(f"ptq4vm.{name}")
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(json.dumps(failed))
"""
    assert fresh(code) == []


def test_importing_the_models_adds_them_to_timm_and_loads_no_quantizer():
    code = """
import json, sys, timm
before = timm.list_models("vim_*")
import ptq4vm.models
ours = [name for name in sys.modules if name.startswith(("ptq4vm.", "torchao"))]
print(json.dumps([before, timm.list_models("vim_*"), [name for name in ours if ".models" not in name]]))
"""
    before, after, other = fresh(code)
    assert before == []
    sizes = ("base_patch16_224", "nano_patch4_32", "small_patch16_224", "tiny_patch16_224")
    assert set(after) >= {f"vim_{size}" for size in sizes}
    below = ("ptq4vm.ops", "ptq4vm.quantization_specs", "ptq4vm.config_fields", "ptq4vm.backend")
    assert all(name.startswith(below) for name in other)
    assert not any(name.startswith(("ptq4vm.backend.dynamo", "ptq4vm.backend.aot")) for name in other)
