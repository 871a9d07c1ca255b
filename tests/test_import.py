"""What importing does, seen by a fresh process."""

import subprocess
import sys

import pytest

HEAVY = ("timm", "matplotlib", "torch", "torch._inductor", "torchao", "torchvision", "triton", "sklearn", "tqdm")


def run(code: str, *options: str) -> tuple[str, str]:
    """Standard output and error."""
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_importing_the_package_loads_nothing_and_says_nothing():
    found = f"print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run(f"import sys, ptq4vm; {found}", "-W", "error") == ("[]\n", "")


@pytest.mark.parametrize("name", ["QuantConfig", "Learning", "Granularity"])
def test_a_config_needs_no_torch(name):
    out, err = run(f"import sys, ptq4vm; ptq4vm.{name}; print('torch' in sys.modules)", "-W", "error")
    assert (out, err) == ("False\n", "")


def test_the_verbs_say_nothing_and_leave_cuda_alone():
    code = "import sys, ptq4vm.api, ptq4vm.checkpoint, torch; print(torch.cuda.is_initialized()); "
    heavy = ("timm", "matplotlib", "torchvision", "sklearn")
    code += f"print([name for name in {heavy!r} if name in sys.modules])"
    assert run(code) == ("False\n[]\n", "")


def test_no_handler_is_added_to_the_log():
    code = "import logging, ptq4vm.api; print(logging.getLogger('ptq4vm').handlers, logging.getLogger().handlers)"
    assert run(code) == ("[] []\n", "")


def test_every_public_name_is_there():
    code = "import ptq4vm; print(all(callable(getattr(ptq4vm, name)) for name in ptq4vm.__all__)); "
    code += "print(set(ptq4vm.__all__) <= set(dir(ptq4vm)))"
    assert run(code) == ("True\nTrue\n", "")


def test_a_name_that_is_not_there_is_an_attribute_error():
    code = "import ptq4vm\ntry:\n    ptq4vm.quantise\nexcept AttributeError as error:\n    print(error)"
    assert run(code) == ("module 'ptq4vm' has no attribute 'quantise'\n", "")


def test_importing_the_models_adds_them_to_timm():
    code = "import timm; print(timm.list_models('vim_*')); import ptq4vm.models; print(timm.list_models('vim_*'))"
    out, _ = run(code)
    names = ["vim_base_patch16_224", "vim_nano_patch4_32", "vim_small_patch16_224", "vim_tiny_patch16_224"]
    assert out == f"[]\n{names}\n"


def test_models_do_not_load_the_quantizer():
    code = "import sys, ptq4vm.models; print([name for name in sys.modules if name.startswith(('ptq4vm.', 'torchao'))])"
    out, _ = run(code)
    loaded = {name for name in eval(out) if not name.startswith("ptq4vm.models")}
    assert loaded <= {"ptq4vm.ops", "ptq4vm.reference", "ptq4vm.config"}
