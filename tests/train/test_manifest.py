import subprocess
from pathlib import Path

from hybrid_scale.train.manifest import commit


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_a_checkout(tmp_path):
    assert commit(tmp_path / "absent") is None
    git(tmp_path, "init", "--quiet")
    assert commit(tmp_path) is None, "nothing was committed yet"
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "--quiet", "--message=x")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "installed").mkdir()
    assert commit(tmp_path / "installed") is None, "a package inside somebody's repository isn't its code"
