"""The two definitions of the image say the same, and hold what `make env` needs. No image is built."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CONTAINER = ROOT / "slurm" / "container"


@dataclass(frozen=True)
class Image:
    """What a definition says: the image it begins with, the repository's files that it copies, command and PATH."""

    base: str
    files: tuple[str, ...]
    folder: str
    profile: tuple[str, str]
    command: str
    path: str


def of_dockerfile() -> Image:
    lines = [line for line in (CONTAINER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    keywords = [line.split()[0] for line in lines]
    assert keywords == ["FROM", "COPY", "COPY", "RUN", "ENV", "ENV"]
    said = [line.split(maxsplit=1)[1] for line in lines]
    *files, folder = said[1].split()
    source, target = said[2].split()
    return Image(said[0], tuple(files), folder, (source, target), said[3], said[4])


def of_apptainer() -> Image:
    text = re.sub(r"^#.*\n", "", (CONTAINER / "safework.def").read_text(), flags=re.MULTILINE)
    header, *sections = re.split(r"^%", text, flags=re.MULTILINE)
    fields = dict(line.split(": ") for line in header.split("\n") if line)
    assert fields["Bootstrap"] == "docker"
    named = dict(section.split("\n", 1) for section in sections)
    assert list(named) == ["files", "post", "environment"]
    *copies, (source, target) = [line.split() for line in named["files"].splitlines() if line]
    (folder,) = {target for _, target in copies}
    path = named["environment"].strip().removeprefix("export ")
    files = tuple(source for source, _ in copies)
    return Image(fields["From"], files, folder, (source, target), named["post"].strip(), path)


def test_both_definitions_make_the_same_image() -> None:
    assert of_dockerfile() == of_apptainer()


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """A folder with what the image has in its own."""
    for name in of_dockerfile().files:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_image_holds_what_the_environment_is_made_from(inside: Path) -> None:
    done = subprocess.run(["make", "--dry-run", "env", "EXTRA=gpu"], cwd=inside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "setup_env.py --extra gpu --venv .venv" in done.stdout
    image = of_dockerfile()
    assert image.command == f"bash {image.folder}install.sh"
    assert image.path == f"PATH={image.folder}.venv/bin:$PATH"


def test_a_login_shell_has_the_same_path() -> None:
    """Enroot and Pyxis start all programs from one. Debian's /etc/profile sets PATH and reads *.sh of profile.d."""
    image = of_dockerfile()
    source, target = image.profile
    assert re.fullmatch(r"/etc/profile\.d/[a-z]+\.sh", target)
    profile = f"PATH=/usr/bin:/bin; . {ROOT / source}; printenv PATH"
    done = subprocess.run(["/bin/sh", "-c", profile], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == image.path.removeprefix("PATH=").replace("$PATH", "/usr/bin:/bin")


def test_the_image_gets_debians_packages_and_then_the_environment(inside: Path) -> None:
    """With a fake apt-get and make, which write down how they were called."""
    for name in ("apt-get", "make"):
        program(inside / name, f'echo "{name} $*" >> {inside}/calls; echo "${{TMPDIR:-}}" >> {inside}/temporary')
    environment = {"PATH": f"{inside}:/usr/bin:/bin"}
    subprocess.run(["bash", "install.sh"], cwd=inside, env=environment, check=True)
    update, packages, clean, make = (inside / "calls").read_text().splitlines()
    assert (update, clean, make) == ("apt-get update", "apt-get dist-clean", "make env EXTRA=gpu")
    assert {"make", "g++", "libibverbs1"} < set(packages.split())
    # Not in the host's /tmp, where Apptainer's builds would have it, and not in the image.
    temporary = Path((inside / "temporary").read_text().splitlines()[-1])
    assert temporary.parent == inside
    assert not temporary.exists()
    program(inside / "apt-get", "exit 9")
    assert subprocess.run(["bash", "install.sh"], cwd=inside, env=environment).returncode == 9
