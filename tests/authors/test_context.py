"""Which imports resolve to stand-ins, which to the real packages, and what is left behind."""

import importlib
import sys

import pytest
import torch
from helpers.fake_packages import packages
from helpers.strategies import normal

from ptq4vm.authors import context, stand_ins
from ptq4vm.authors.catalogue import EXTENSIONS, STAND_INS
from ptq4vm.authors.mamba import Mamba
from ptq4vm.authors.scans import selective_scan_fn

BROKEN = """
    raise ImportError("libcudart.so.12: cannot open shared object file")
"""
CLONE = {
    "mamba_ssm/__init__.py": """
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.modules.mamba_simple import Mamba
        from mamba_ssm.utils.generation import GenerationMixin
        __version__ = "of the fork"
    """,
    "mamba_ssm/modules/__init__.py": "",
    "mamba_ssm/modules/mamba_simple.py": """
        from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn
        from mamba_ssm.ops.triton.layer_norm import RMSNorm
        class Mamba:
            bimamba_type, inner = "v2", mamba_inner_fn
    """,
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/selective_scan_interface.py": """
        import selective_scan_cuda
        selective_scan_fn = mamba_inner_fn = "compiled"
    """,
    "mamba_ssm/ops/triton/__init__.py": "",
    "mamba_ssm/ops/triton/layer_norm.py": "raise ImportError('no triton')",
    "mamba_ssm/utils/__init__.py": "",
    "mamba_ssm/utils/generation.py": "import a_package_of_language_models",
    "mamba_ssm/utils/torch.py": "custom = 'own'",
}
"""A fork of mamba_ssm as its folder is in a clone: Python files, and no extension."""


def stand_in_modules():
    return [name for name in sys.modules if name.partition(".")[0] in EXTENSIONS]


def test_nothing_is_there_before_and_after():
    before = list(sys.meta_path)
    with stand_ins():
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as found
    assert found is selective_scan_fn
    assert (sys.meta_path, stand_in_modules()) == (before, [])
    with pytest.raises(ModuleNotFoundError, match="No module named 'mamba_ssm'"):
        import mamba_ssm  # noqa: F401


@pytest.mark.parametrize("module", STAND_INS)
def test_every_name_of_the_table_can_be_imported(module):
    with stand_ins():
        found = importlib.import_module(module)
        for name, value in STAND_INS[module].items():
            assert getattr(found, name) is value
        parent, _, leaf = module.rpartition(".")
        assert not parent or getattr(importlib.import_module(parent), leaf) is found


def test_parents_of_every_module_are_in_the_table():
    assert {module.rpartition(".")[0] for module in STAND_INS} - {""} <= set(STAND_INS)
    assert {module.partition(".")[0] for module in STAND_INS} == set(EXTENSIONS)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import mamba_ssm.foo", ImportError, "stand-in for mamba_ssm has no foo; it covers .*Mamba,"),
        ("from mamba_ssm import foo", ImportError, "stand-in for mamba_ssm has no foo; it covers .*Mamba,"),
        (
            "import causal_conv1d; causal_conv1d.foo",
            AttributeError,
            "causal_conv1d has no foo; it covers causal_conv1d_fn",
        ),
        ("import mamba_ssm.ops.triton.foo.bar", ImportError, "mamba_ssm.ops.triton has no foo; it covers layernorm, "),
        ("from selective_scan_cuda import foo", ImportError, "selective_scan_cuda has no foo; it covers fwd, bwd$"),
    ],
)
def test_other_names_say_which_are_covered(code, error, message):
    with stand_ins(), pytest.raises(error, match=message):
        exec(code)


def test_a_name_that_is_not_covered_can_be_asked_for():
    with stand_ins():
        import mamba_ssm

        assert not hasattr(mamba_ssm, "foo") and mamba_ssm.__doc__ is None


@pytest.mark.parametrize(
    "name", ["mamba_ssm.Mamba2", "causal_conv1d.causal_conv1d_update", "mamba_ssm.utils.hf.load_config_hf"]
)
def test_what_is_not_covered_is_refused_when_it_is_called(name):
    with stand_ins():
        module, _, leaf = name.rpartition(".")
        found = getattr(importlib.import_module(module), leaf)
    with pytest.raises(NotImplementedError, match=f"ptq4vm has no stand-in for {name}: "):
        found(1, key=2)


def test_mambas_mixer_as_users_import_it():
    with stand_ins():
        from mamba_ssm import Mamba as first
        from mamba_ssm.modules.mamba_simple import Mamba as second
    assert first is second is Mamba


def test_contexts_nest_and_end_with_the_outer_one():
    with stand_ins():
        with stand_ins():
            import selective_scan_cuda
        assert sys.modules["selective_scan_cuda"] is selective_scan_cuda
        from causal_conv1d import causal_conv1d_fn  # noqa: F401
    assert stand_in_modules() == []


def test_an_exception_ends_it():
    before = list(sys.meta_path)
    with pytest.raises(ZeroDivisionError), stand_ins():
        import mamba_ssm  # noqa: F401

        1 / 0  # noqa: B018
    assert (sys.meta_path, stand_in_modules()) == (before, [])


def test_a_forward_may_import_while_it_is_open():
    def forward(x):
        import selective_scan_cuda_core

        return selective_scan_cuda_core.fwd(x, x, -x[0].abs(), x[:, None], x[:, None], None, None, False, 1)[0]

    with stand_ins():
        assert forward(normal(1, 3, 3)).shape == (1, 3, 3)
    with pytest.raises(ModuleNotFoundError):
        forward(normal(1, 3, 3))


def test_a_forks_python_files_are_used_without_its_extension(tmp_path):
    with packages(tmp_path, CLONE), stand_ins():
        import mamba_ssm
        from mamba_ssm.utils.torch import custom

        assert mamba_ssm.__version__ == "of the fork" and custom == "own"
        assert mamba_ssm.Mamba.bimamba_type == "v2" and mamba_ssm.__file__ == str(tmp_path / "mamba_ssm/__init__.py")
        assert mamba_ssm.selective_scan_fn is selective_scan_fn
        assert vars(mamba_ssm.Mamba)["inner"] is STAND_INS["mamba_ssm"]["mamba_inner_fn"]
        assert mamba_ssm.GenerationMixin is STAND_INS["mamba_ssm.utils.generation"]["GenerationMixin"]
        with pytest.raises(ModuleNotFoundError, match=r"mamba_ssm\.modules has no foo"):
            import mamba_ssm.modules.foo
    assert stand_in_modules() == []


def test_a_package_whose_own_init_fails_keeps_its_files(tmp_path):
    files = CLONE | {"mamba_ssm/__init__.py": "import a_package_of_language_models"}
    with packages(tmp_path, files), stand_ins():
        from mamba_ssm import Mamba as of_the_table
        from mamba_ssm.modules.mamba_simple import Mamba as of_the_fork

        assert of_the_table is Mamba and of_the_fork.bimamba_type == "v2"


@pytest.mark.parametrize("text", [BROKEN, "raise RuntimeError('ABI')", "import a_library_that_is_not_there"])
def test_an_extension_that_does_not_load_counts_as_absent(tmp_path, text):
    with packages(tmp_path, CLONE | {"selective_scan_cuda.py": text}), stand_ins():
        import selective_scan_cuda
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as found

        assert selective_scan_cuda.fwd is STAND_INS["selective_scan_cuda"]["fwd"] and found is selective_scan_fn


def test_a_folder_without_python_files_is_no_package(tmp_path):
    (tmp_path / "selective_scan" / "csrc").mkdir(parents=True)
    with packages(tmp_path, {}), stand_ins():
        from selective_scan import selective_scan_fn as found

        assert found is STAND_INS["selective_scan"]["selective_scan_fn"]


def test_what_is_whole_is_left_alone(tmp_path):
    whole = {"selective_scan_cuda.py": "fwd = 'compiled'", "mamba_ssm/utils/generation.py": "GenerationMixin = object"}
    with packages(tmp_path, CLONE | whole | {"mamba_ssm/ops/triton/layer_norm.py": "RMSNorm = 'compiled'"}):
        with stand_ins():
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as found
            from selective_scan_cuda import fwd

            assert (found, fwd) == ("compiled", "compiled")
            from causal_conv1d import causal_conv1d_fn

            assert causal_conv1d_fn is STAND_INS["causal_conv1d"]["causal_conv1d_fn"]  # it is absent
        assert sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn == "compiled"
        assert not any(name.startswith("causal_conv1d") for name in sys.modules)


def test_a_package_without_its_extension_that_was_imported_before_comes_back(tmp_path):
    text = "selective_scan_fn = None\n"
    files = {
        "mamba_ssm/__init__.py": "",
        "mamba_ssm/ops/__init__.py": "",
        "mamba_ssm/ops/selective_scan_interface.py": text,
    }
    with packages(tmp_path, files):
        before = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        with stand_ins():
            assert importlib.import_module("mamba_ssm.ops.selective_scan_interface") is not before
        assert sys.modules["mamba_ssm.ops.selective_scan_interface"] is before


def test_the_device_of_a_cpu_tensor_may_be_opened():
    before = torch.cuda.device
    with stand_ins():
        for device in (torch.device("cpu"), "cpu", torch.zeros(1).device):
            with torch.cuda.device(device):
                pass
        with torch.cuda.device(-1):
            pass
        assert torch.cuda.device(torch.device("cuda", 1)).idx == 1 and torch.cuda.device("cuda:2").idx == 2
    assert torch.cuda.device is before
    with pytest.raises(ValueError, match="Expected a cuda device"):
        torch.cuda.device(torch.device("cpu"))


def test_the_model_stays_usable():
    with stand_ins():
        from mamba_ssm import Mamba as layer
    made = layer(8)
    assert torch.equal(made(normal(1, 3, 8)), made(normal(1, 3, 8)))
    assert context.stand_ins is stand_ins
