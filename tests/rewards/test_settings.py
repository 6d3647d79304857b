"""What conf/rewards may say, and what is told of a value that can't work."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recipes.launch.trial import check_row
from rewards import mixing, registry, settings
from rewards.client import Client
from rewards.serve import judge_servers, ready_table
from rewards.verdict import Row
from rewards.verifiers import instructions
from rewards.verifiers.served import ServedVerifier
from rewards.verifiers.templates import TEMPLATES

CONF = Path(__file__).resolve().parents[2] / "conf"

# SafeWork-R1's table, written out again: verifier weights by label, the format reward added to all but two.
SAFEWORK = {
    "safety": {"safety": 1},
    "harmless": {"safety": 1},  # in the table these rows have the label "safety"
    "value": {"value": 1},
    "knowledge": {"knowledge": 1, "normal": 1},
    "knowledge_rule": {"rule_check": 1, "normal": 1},
    "normal": {"normal": 1},
    "general": {"general": 1},
    "general_rule": {"rule_check": 1},
    "muldimif": {"instructions": 1, "normal": 1},
    "geo3k": {"math": 0.9, "format": 0.1},
    "gsm8k": {"math": 0.9, "format": 0.1},
}


def read(*overrides: str) -> settings.RewardsConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw = compose("config", ["recipe=demo", "rewards=safework", *overrides])
    return settings.read(raw.rewards)


def test_safework_s_mixes_are_the_table() -> None:
    expected = {
        label: weights if label in ("geo3k", "gsm8k") else {**weights, "format": 1}
        for label, weights in SAFEWORK.items()
    }
    assert {label: weights for label, weights in read().mix.items() if label != "search"} == expected


def test_a_value_that_can_t_be_is_named_with_its_group() -> None:
    with pytest.raises(ValueError, match=r"^rewards\.client\.retries"):
        read("rewards.client.retries=-1")
    with pytest.raises(ValueError, match=r"^rewards\.client\.retries"):
        read("rewards.client.retries=often")


def test_verifiers_of_one_model_share_a_server_and_each_finds_its_judge() -> None:
    config = read()
    servers = settings.servers(config)
    assert [settings.verifiers(config)[name].server for name in ("knowledge", "normal", "general")] == ["knowledge"] * 3
    assert registry.servers_of(["math", "value", "normal", "general"], config).keys() == {"value", "knowledge"}
    names = mixing.verifier_names(config.mix)
    with Client(registry.servers_of(names, config), config.client) as client:
        verifiers = registry.open_verifiers(names, config, client)
    for name in ("safety", "value", "knowledge", "normal", "general"):
        verifier = verifiers[name]
        assert isinstance(verifier, ServedVerifier)
        assert verifier.template is TEMPLATES[name]
        assert verifier.model == servers[settings.verifiers(config)[name].server or ""].model
    assert verifiers["instructions"] is instructions.score
    general: Row = {"id": "g", "label": "general", "kind": "k", "prompt": "?"}
    with pytest.raises(ValueError, match="'g' has no `answer`"):
        check_row("general", verifiers["general"], general)
    check_row("safety", verifiers["safety"], general)


def test_replicas_get_ports_gpus_and_only_those_that_run_here_are_started(tmp_path: Path) -> None:
    config = read(
        "rewards.servers.safety.replicas=2",
        "rewards.servers.value.endpoints=[http://elsewhere:80/v1]",
        "rewards.supervisor.first_device=4",
        "+rewards.servers.knowledge.arguments=[--max-model-len, '20000']",
    )
    servers = judge_servers(config, tmp_path, "cuda")
    assert [server.name for server in servers] == ["safety_0", "safety_1", "knowledge_0"]
    assert [server.port for server in servers] == [8100, 8101, 8120]
    assert [list(server.devices or ()) for server in servers] == [[4], [5], list(range(6, 14))]
    assert servers[1].environment()["CUDA_VISIBLE_DEVICES"] == "5"
    command = servers[2].command()
    assert command[:2] == ["serve", "models/Qwen2.5-VL-72B-Instruct"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--tensor-parallel-size") + 1] == "8"
    assert command[-2:] == ["--max-model-len", "20000"]
    assert "--enforce-eager" not in command
    assert "--enforce-eager" in judge_servers(config, tmp_path, "cpu")[0].command()
    assert settings.servers(config)["value"].addresses == ["http://elsewhere:80"]


def test_colocated_replicas_share_gpus_and_may_sleep(tmp_path: Path) -> None:
    config = read("rewards.placement=colocated", "rewards.servers.safety.replicas=2")
    servers = judge_servers(config, tmp_path, "cuda")
    assert [list(server.devices or ()) for server in servers] == [[0], [1], list(range(4)), list(range(8))]
    for server in servers:
        assert "--enable-sleep-mode" in server.command()
        assert server.environment()["VLLM_SERVER_DEV_MODE"] == "1"
    on_cpu = judge_servers(config, tmp_path, "cpu")[0]  # where vLLM refuses the argument, and has the endpoints
    assert "--enable-sleep-mode" not in on_cpu.command() and on_cpu.environment()["VLLM_SERVER_DEV_MODE"] == "1"
    disaggregated = judge_servers(read(), tmp_path, "cuda")[0]
    assert "--enable-sleep-mode" not in disaggregated.command()
    assert "VLLM_SERVER_DEV_MODE" not in disaggregated.environment()


def test_beyond_loopback_only_with_a_token_which_is_not_in_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"rewards\.servers\.safety\.host='0\.0\.0\.0'.*key_variable"):
        read("+rewards.servers.safety.host=0.0.0.0")
    config = read("+rewards.servers.safety.host=0.0.0.0", "+rewards.servers.safety.key_variable=JUDGE_KEY")
    server = judge_servers(config, tmp_path, "cpu")[0]
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="'JUDGE_KEY': no such environment variable"):
        server.environment()
    monkeypatch.setenv("JUDGE_KEY", "sesame-4711")
    assert server.environment()["VLLM_API_KEY"] == "sesame-4711"
    assert "sesame" not in " ".join(server.command())
    assert server.command()[server.command().index("--middleware") + 1] == "rewards.token_guard.require_token"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.placement=beside"], r"placement='beside': use one of disaggregated, colocated"),
        (
            ["rewards.placement=colocated", "rewards.servers.value.endpoints=[http://elsewhere:80]"],
            r"servers\.value\.endpoints=\['http://elsewhere:80'\]: .*placement=disaggregated",
        ),
        (
            [
                *("rewards.placement=colocated", "+rewards.servers.safety.host=0.0.0.0"),
                "+rewards.servers.safety.key_variable=JUDGE_KEY",
            ],
            r"servers\.safety\.host='0\.0\.0\.0': .*development endpoints.*127\.0\.0\.1",
        ),
        (["rewards.verifiers.safety.server=sfaety"], r"verifiers\.safety\.server='sfaety': no such server"),
        (["rewards.verifiers.safety.template=null"], r"verifiers\.safety: give a template"),
        (["+rewards.verifiers.safety.rule=math"], r"verifiers\.safety: give a template"),
        (["+rewards.verifiers.safety.arguments={limit: 3}"], r"arguments are a rule's"),
        (["+rewards.verifiers.safety.colour=red"], r"rewards\.verifiers\.safety\.colour: no such field"),
        (["+rewards.servers.safety.arguments=[--host,0.0.0.0]"], r"safety\.arguments has --host: use host"),
        (["+rewards.servers.safety.arguments=['--api-key=hush']"], r"arguments has --api-key: use key_variable"),
        (["rewards.servers.safety.endpoints=['http://a:hush@b']"], r"endpoints: an address has a user and password"),
        (["+rewards.servers.safety.colour=red"], r"rewards\.servers\.safety\.colour: no such field"),
        (["+rewards.servers.safety.runner=guess"], r"servers\.safety\.runner='guess': use one of generate, pooling"),
        (["rewards.servers.safety.replicas=0"], r"servers\.safety\.replicas=0: must be above 0"),
        (["rewards.servers.safety.replicas=11"], r"servers\.value\.port=8110: .* port 8110, which is 'safety''s"),
        (
            ["rewards.servers.safety.model=models/Qwen2.5-VL-72B-Instruct"],
            r"servers\.knowledge\.model=.* is served by 'safety' already: name that one",
        ),
        (["+rewards.servers.safety.endpoints=['judge:8000']"], r"safety\.endpoints='judge:8000': give an address as"),
        (["+rewards.servers.safety.endpoints=['http:/judge']"], r"safety\.endpoints='http:/judge': give an address as"),
        (["rewards.mix.safety.safety=-1"], r"rewards\.mix\.safety\.safety=-1: give a number from 0 to 1e6; for the"),
        (["rewards.client.hedge_after=1"], r"client\.hedge_after=1\.0: must be above 1"),
        (["rewards.client.max_failed=2"], r"client\.max_failed=2\.0: must be in \[0, 1\]"),
        (["rewards.normalise=batch"], r"normalise='batch': use one of none, group"),
        (
            ["rewards.constraint.verifier=sfaety"],
            r"constraint\.verifier='sfaety': no mix has it",
        ),
        (
            ["rewards.constraint.verifier=safety", "rewards.constraint.floor=1.9"],
            r"constraint\.floor=1\.9",
        ),
        (
            ["rewards.constraint.verifier=safety", "rewards.constraint.initial=9"],
            r"constraint\.initial=9\.0: must be in \[0, rewards\.constraint\.maximum\]",
        ),
    ],
)  # fmt: skip
def test_a_value_that_can_t_work_is_named(overrides: list[str], message: str) -> None:

    with pytest.raises(ValueError, match=message):
        read(*overrides)


def test_a_rule_takes_arguments_and_a_template_may_be_a_dotted_path() -> None:
    raw: Any = OmegaConf.load(CONF / "rewards" / "base.yaml")
    raw.mix = {"l": {"brief": 1.0, "judged": 1.0}}
    raw.servers = {"judge": {"model": "m"}}
    raw.verifiers = {
        "brief": {"rule": "length", "arguments": {"limit": 2}},
        "judged": {"template": "rewards.verifiers.templates.NORMAL", "server": "judge"},
        "lost": {"template": "norml", "server": "judge"},
        "function": {"template": "rewards.verifiers.judges.written_label", "server": "judge"},
    }
    config = settings.read(raw)
    with Client(settings.servers(config), config.client) as client:
        verifiers = registry.open_verifiers(["brief", "judged", "capability"], config, client)
        with pytest.raises(ValueError, match="unknown template 'norml'"):
            registry.open_verifiers(["lost"], config, client)
        with pytest.raises(
            ValueError, match=r"^template 'rewards.verifiers.judges.written_label' is a function, not a"
        ):
            registry.open_verifiers(["function"], config, client)
    assert verifiers["brief"]({}, "one two three").score == 0.5  # type: ignore[union-attr]
    assert isinstance(verifiers["judged"], ServedVerifier)
    assert verifiers["judged"].template is TEMPLATES["normal"]


def test_what_a_judge_s_server_is_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's command line, and the environment: the project can be imported, and on a CPU no device is looked for and
    nothing compiled."""
    config = read("+rewards.servers.safety.arguments=[--max-model-len, '512']")
    model = config.servers["safety"]["model"]
    common = ["serve", model, "--host", "127.0.0.1", "--port", "8100", "--served-model-name", model]
    common += ["--runner", "generate", "--tensor-parallel-size", "1"]
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    on_cpu = judge_servers(config, tmp_path, "cpu")[0]
    assert on_cpu.command() == [*common, *on_cpu.cpu_arguments, "--max-model-len", "512"]
    environment = on_cpu.environment()
    assert environment["PYTHONPATH"] == f"{CONF.parent}:/mine"
    expected = {
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTHONUNBUFFERED": "1",
    }
    assert expected.items() <= environment.items()
    assert "VLLM_API_KEY" not in environment and "VLLM_SERVER_DEV_MODE" not in environment
    monkeypatch.delenv("PYTHONPATH")
    on_gpu = judge_servers(config, tmp_path, "cuda")[0]
    assert on_gpu.command()[: len(common)] == common
    assert on_gpu.environment()["PYTHONPATH"] == str(CONF.parent)
    assert on_gpu.environment()["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, on_gpu.devices or ()))
    assert "TORCH_COMPILE_DISABLE" not in on_gpu.environment()


def test_the_ready_table_says_who_serves_what(tmp_path: Path) -> None:
    config = read()

    class Started:
        pid = 4711

    servers = judge_servers(config, tmp_path, "cpu")
    for server in servers:
        server.process = Started()  # type: ignore[assignment]
    table = ready_table(config, servers)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["verifiers"] == ["safety", "value", "knowledge, normal, general"]
    assert cells["address"] == [f"http://127.0.0.1:{port}" for port in (8100, 8110, 8120)]
    assert cells["server"] == [server.name for server in servers]
    assert cells["model"] == [server.server.model for server in servers]
    assert cells["pid"] == ["4711"] * 3
    assert cells["log"] == [str(server.log) for server in servers]
    assert list(cells) == ["server", "verifiers", "model", "address", "pid", "log"]
