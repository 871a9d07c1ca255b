import pytest

from ptq4vm.hub.names import HubName, hint, is_hub_name, is_repo, parse_name


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/3", "a" * 40])
@pytest.mark.parametrize("repo", ["org/name", "o/n", "Some-Org_1/name.v2-w4a4"])
def test_a_name_is_what_it_was_made_of(repo, revision):
    name = HubName(repo, revision)
    assert is_hub_name(str(name)) and parse_name(str(name)) == name
    assert parse_name(str(name).removeprefix("hf-hub:")) == name  # push_to_hub takes it without the prefix


@pytest.mark.parametrize(
    "repo",
    ["", "name", "a/b/c", "../name", "org/..", "org/a--b", "org/.name", "org/name.git", "org/na me", "o/" + "n" * 95],
)
def test_what_the_hub_does_not_allow_is_refused_with_the_form(repo):
    assert not is_repo(repo)
    with pytest.raises(
        ValueError, match=r"names no repository of the Hub: write hf-hub:org/name, or hf-hub:org/name@rev"
    ):
        parse_name(f"hf-hub:{repo}")


@pytest.mark.parametrize("revision", ["", "a b", "a@b", "a?b"])
def test_a_revision_that_is_none_is_refused(revision):
    with pytest.raises(ValueError, match="names no revision after the @"):
        parse_name(f"hf-hub:org/name@{revision}")


def test_only_what_may_be_a_repository_is_hinted_at():
    assert hint("org/name@v1") == "; if it is a repository of the Hub, write hf-hub:org/name@v1"
    assert [hint(name) for name in ("name", "/tmp/name", "a/b/c", "../name", "hf-hub:org/name")] == [""] * 5
