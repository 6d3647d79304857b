"""``python -m recipes.download recipe=… [overrides…]``: fetch a run's model and judges from the Hugging Face Hub.

Fills each folder for which ``model.hub`` or ``rewards.servers.NAME.hub`` names a repository with the repository's
safetensors, configuration and tokenizer, all of one commit. A complete file is not fetched again, so an interrupted
download goes on with the file that was being fetched. A file that differs from the repository's is never replaced. The
free space of the disk is checked first.

``HF_TOKEN`` is the token for repositories that ask for consent. ``HF_ENDPOINT`` is a mirror.
"""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import hydra
from huggingface_hub import constants, snapshot_download
from omegaconf import DictConfig

from recipes.command_line import from_command_line
from recipes.config import Config, generates, parse
from recipes.errors import ConfigError
from rewards import mixing, registry

GB = 1e9
# Weights in formats other than safetensors. Repositories often have a second copy of the weights in such a format.
NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "original/*", "consolidated*"]


@dataclass(frozen=True)
class Plan:
    """The files that are missing in a folder."""

    folder: Path
    repository: str
    # The commit of the repository that the files belong to.
    commit: str
    # The names of the missing files.
    names: list[str]
    # Their total size in bytes.
    size: int


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    try:
        download(folders(parse(raw)))
    except ConfigError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)


def folders(config: Config) -> dict[Path, str]:
    """Folder → repository of the Hub, for the model that training starts from and the judges that the run serves."""
    wanted = {}
    # A later stage starts from the model that the stage before it writes.
    if config.model.hub is not None and config.stage.after is None:
        wanted[Path(config.model.path)] = config.model.hub
    names = {*mixing.verifier_names(config.rewards.mix), *config.data.scores} if generates(config) else set()
    for server in registry.servers_of(names, config.rewards).values():
        if server.hub is not None and not server.endpoints:
            wanted[Path(server.model)] = server.hub
    return wanted


def download(wanted: Mapping[Path, str]) -> None:
    """Fetch the files that are missing in each folder.

    All folders are checked before anything is fetched. Raises ConfigError where a check or a download fails.
    """
    plans = [plan(folder, repository) for folder, repository in wanted.items()]
    check_disk(plans)
    for step in plans:
        if not step.names:
            print(f"{step.folder}: complete ({step.repository} at {step.commit[:12]})", flush=True)
            continue
        print(f"{step.folder}: {len(step.names)} files, {step.size / GB:.1f} GB of {step.repository}", flush=True)
        try:
            snapshot_download(step.repository, revision=step.commit, local_dir=step.folder, ignore_patterns=NOT_NEEDED)
        except Exception as error:  # from the Hub's client, its HTTP library, or the disk
            raise ConfigError(f"{step.repository}: {_first_line(error)}; run it again, it goes on from here") from error


def plan(folder: Path, repository: str) -> Plan:
    """The files of a repository that the folder lacks.

    Raises ConfigError for a repository that can't be read, has no safetensors, or would replace a file of the folder.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"HF_HUB_OFFLINE is set, so {repository} can't be read: unset it for this command")
    try:
        files = snapshot_download(repository, local_dir=folder, ignore_patterns=NOT_NEEDED, dry_run=True)
    except Exception as error:  # from the Hub's client or its HTTP library
        raise ConfigError(
            f"{repository}: {_first_line(error)}; check the name, the network (HF_ENDPOINT for a mirror), and whether "
            "its page asks for consent (HF_TOKEN)"
        ) from error
    assert not isinstance(files, str)
    if not any(file.filename.endswith(".safetensors") for file in files):
        raise ConfigError(f"{repository} has no weights as safetensors; give another repository, or convert them")
    missing = [file for file in files if file.will_download]
    different = [file.filename for file in missing if (folder / file.filename).is_file()]
    if different:
        raise ConfigError(
            f"{folder} has other files than {repository}: {', '.join(different[:3])}; move them away, or give another "
            "folder. Nothing was changed"
        )
    size = sum(file.file_size or 0 for file in missing)
    return Plan(folder, repository, files[0].commit_hash, [file.filename for file in missing], size)


def check_disk(plans: list[Plan]) -> None:
    """Raises ConfigError where a disk has too little free space for all folders on it together."""
    needed: dict[int, int] = {}
    for step in plans:
        existing = next(parent for parent in (step.folder, *step.folder.absolute().parents) if parent.exists())
        device = existing.stat().st_dev
        needed[device] = needed.get(device, 0) + step.size
        free = shutil.disk_usage(existing).free
        if needed[device] > free:
            raise ConfigError(
                f"{needed[device] / GB:.1f} GB are to be fetched, {free / GB:.1f} GB are free on the disk of "
                f"{step.folder}: make room, or put models elsewhere (model.path, rewards.servers.NAME.model)"
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


if __name__ == "__main__":
    from_command_line(main)
