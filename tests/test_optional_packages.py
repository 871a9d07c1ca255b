import pytest

from ptq4vm import optional_packages
from ptq4vm.cli.main import main


def test_what_is_installed_is_not_asked_for():
    optional_packages.require("this test", "dev", "pytest", "torch")


def test_all_that_is_missing_is_named_with_its_extra():
    with pytest.raises(ImportError, match=r"a test needs no_a and no_b: pip install 'ptq4vm\[some\]'"):
        optional_packages.require("a test", "some", "no_a", "pytest", "no_b")


@pytest.mark.parametrize(
    "command",
    [
        ("benchmark", "vim_nano_patch4_32", "--picture", "time.png"),
        ("inspect", "vim_nano_patch4_32", "--data-dir", "digits", "--output", "pictures"),
    ],
)
def test_without_matplotlib_pictures_are_refused_before_any_work(monkeypatch, tmp_path, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optional_packages, "find_spec", lambda package: None)
    assert main(command) == 1 and not list(tmp_path.iterdir())
    assert f"{command[-2]} needs matplotlib: pip install 'ptq4vm[plot]'" in capsys.readouterr().err
