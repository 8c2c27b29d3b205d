"""The real client against the loopback Hub: repos, revisions, trees, ranges, errors."""

import pytest
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture(scope="module")
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture(scope="module")
def repo(api, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "README.md").write_text("---\ntags: [a]\n---\n# hello\n")
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 64)
    (folder / "sub").mkdir()
    (folder / "sub" / "note.txt").write_text("note")
    name = api.create_repo("org/client").repo_id
    api.upload_folder(repo_id=name, folder_path=folder)
    return name, folder


def test_who_am_i(api):
    assert api.whoami()["name"] == "tester"


def test_create_twice(api, repo):
    assert api.create_repo(repo[0], exist_ok=True).repo_id == repo[0]
    with pytest.raises(Exception, match="409|already"):
        api.create_repo(repo[0])


def test_upload_lists_and_downloads_the_same_bytes(api, repo, tmp_path):
    name, folder = repo
    assert set(api.list_repo_files(name)) == {
        ".gitattributes", "README.md", "weights.safetensors", "sub/note.txt",
    }  # fmt: skip
    local = snapshot_download(name, cache_dir=tmp_path)
    for file in ("README.md", "weights.safetensors", "sub/note.txt"):
        assert (folder / file).read_bytes() == open(f"{local}/{file}", "rb").read()
    assert api.model_info(name).tags == ["a"]


def test_large_files_went_through_lfs(api, repo):
    info = {e.path: e for e in api.list_repo_tree(repo[0], recursive=True)}
    assert info["weights.safetensors"].lfs.size == 256 * 64
    assert info["README.md"].lfs is None
    assert not hasattr(info["sub"], "size")


def test_the_same_upload_makes_no_commit(api, repo):
    before = api.model_info(repo[0]).sha
    api.upload_folder(repo_id=repo[0], folder_path=repo[1])
    assert api.model_info(repo[0]).sha == before


def test_revisions(api, repo, tmp_path):
    name, _ = repo
    first = api.model_info(name).sha
    api.create_branch(name, branch="feature/x")
    api.create_tag(name, tag="v1")
    data = b"changed"
    api.upload_file(
        repo_id=name, path_in_repo="sub/note.txt", path_or_fileobj=data, revision="feature/x"
    )

    def read(revision):
        return open(hf_hub_download(name, "sub/note.txt", revision=revision), "rb").read()

    assert read("feature/x") == b"changed"
    assert "sub" in {e.path for e in api.list_repo_tree(name, revision="feature/x")}
    assert read("main") == read("v1") == read(first) == b"note"
    refs = api.list_repo_refs(name)
    assert {b.name for b in refs.branches} == {"main", "feature/x"}
    assert [t.name for t in refs.tags] == ["v1"]
    commits = [len(api.list_repo_commits(name, revision=r)) for r in ("main", "feature/x")]
    assert commits[1] == commits[0] + 1


def test_file_system_reads_ranges(repo):
    files = HfFileSystem()
    name = repo[0]
    assert f"{name}/sub/note.txt" in files.glob(f"{name}/**")
    with files.open(f"{name}/weights.safetensors") as file:
        file.seek(300)
        assert file.read(4) == bytes([44, 45, 46, 47])


def test_errors_have_the_clients_classes(repo):
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/nothing", "a.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo[0], "README.md", revision="nothing")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo[0], "nothing.txt")


def test_a_wrong_token_is_refused(hub):
    with pytest.raises(Exception, match="401|Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_wrong").whoami()


def test_delete(api):
    api.create_repo("org/gone")
    api.delete_repo("org/gone")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/gone")
