"""Do the tests of docs/verification.md, "First contact with GPUs", fail on the former code?

``python -m tests.former_faults [NAME…]`` takes each remedy of :data:`FAULTS` back in a copy of this tree, the working
tree as it is, and runs the one test that should fail then. It prints ``fails``, ``STILL PASSES`` or ``FAILS OTHERWISE``
(not with the words that the fault is told by), and ends with 1 unless all fail as they should.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LINKED = (".venv", "build")  # what git ignores and tests need
SHOWN = 4000  # characters of the output of a test that does not fail as it should


class Fault(NamedTuple):
    """A remedy, and the code before it.

    ``finding`` is how the row of the table begins. In ``file``, ``text`` becomes ``former``. Then ``test`` fails, and
    its output has ``says``.
    """

    name: str
    finding: str
    file: str
    text: str
    former: str
    test: str
    says: str


GPU_CHECKS = "tests/te/test_gpu_checks.py::test_the_gpu_checks_pass_but_for_numbers"
FAKE_CUDA = "tests/rollout/test_fake_cuda.py::test_what_is_shared_is_used_in_order_on_its_device_and_while_it_lives"
SLEEP = (
    "tests/rollout/test_undefined_memory.py::"
    "test_after_sleep_and_after_a_batch_that_was_broken_off_every_bit_is_as_before[synchronous]"
)
SITE_FILE = (
    "tests/recipes/test_slurm.py::test_a_site_file_may_read_what_is_not_set_and_a_toolkit_of_the_site_is_not_seen"
)

# Tests and rows of the table that have no fault, and why.
NOT_TRIED = {
    "`flashinfer-cubin` is not pinned": "refuted: there is no remedy, and no test",
    "tests/gpu/test_fp8.py": "a GPU's",
    "tests/gpu/test_sleep.py": "a GPU's",
    "tests/rollout/test_undefined_memory.py::test_asynchronous_scheduling_says_the_same": (
        "it compares two ways of vLLM; nothing of ours was amended for it"
    ),
    "tests/slurm/test_scripts.py::test_the_rung_of_two_nodes_submits_signals_judges_and_records": (
        "minutes of a real Slurm; tests/test_gpu_rehearsal.py has the same faults with a fake sbatch"
    ),
    "tests/slurm/test_scripts.py::test_the_ladder_is_a_job_a_stage_and_ends_with_one_that_fails": (
        "a real Slurm; test_ladder has the same fault in one launch"
    ),
    "tests/slurm/test_small_recipe.py": "ten minutes of a real Slurm; test_slurm has the same fault with a fake one",
    "tests/te/test_layers.py::test_fp8_tensors_have_an_empty_storage": (
        "what Transformer Engine does; the remedy's test is in test_network"
    ),
}

FAULTS = (
    Fault(
        "rank variables",
        "The GPU checks left a rank's variables",
        "tests/gpu/conftest.py",
        "    yield here\n    parallel.destroy()\n",
        "        yield here\n    parallel.destroy()\n",
        GPU_CHECKS,
        "is not prepared for this launch; before srun or torchrun",
    ),
    Fault(
        "one GPU a node",
        "The GPU checks expected one GPU",
        "tests/gpu/test_recipe.py",
        'machine["device"] == cuda.machine()',
        'machine["device"].startswith("1 x NVIDIA")',
        "tests/te/test_gpu_checks.py::test_a_run_of_one_process_is_recognised_on_a_node_of_any_size[8]",
        "assert is_one_process_here",
    ),
    Fault(
        "Transformer Engine seen on a CPU",
        "Where Transformer Engine is installed",
        "megatron_ext/platform/cpu.py",
        "    sys.modules[TRANSFORMER_ENGINE] = None  # type: ignore[assignment]\n",
        "",
        GPU_CHECKS,
        "Could not find shared object file for Transformer Engine torch lib",
    ),
    Fault(
        "Transformer Engine imported before",
        "Where Transformer Engine is installed",
        "megatron_ext/platform/cpu.py",
        "    if sys.modules.get(TRANSFORMER_ENGINE) is not None:\n",
        "    if False:\n",
        "tests/megatron_ext/test_platform.py::"
        "test_the_cpu_platform_is_activated_before_transformer_engine_is_imported",
        "DID NOT RAISE",
    ),
    Fault(
        "no bias_correction",
        "A CPU checkpoint had no `bias_correction`",
        "megatron_ext/checkpoint.py",
        "        for field, default in inner.defaults.items():\n            group.setdefault(field, default)\n",
        "",
        "tests/te/test_twins.py::test_the_other_platform_goes_on_from_a_checkpoint[cpu to gpu]",
        "bias_correction",
    ),
    Fault(
        "a step that is no integer",
        "A CPU checkpoint had no `bias_correction`",
        "megatron_ext/checkpoint.py",
        'group["step"] = int(group.get("step", 0))',
        'group["step"] = group.get("step", 0)',
        "tests/te/test_twins.py::test_the_other_platform_goes_on_from_a_checkpoint[cpu to gpu]",
        "pybind11 needs integers",
    ),
    Fault(
        "sizes of the checks' model",
        "The model of the FP8 engine checks",
        "tests/gpu/conftest.py",
        "dtype=torch.bfloat16, intermediate=256)",
        "dtype=torch.bfloat16, intermediate=160)",
        "tests/te/test_gpu_checks.py::test_the_checks_model_has_sizes_that_fp8_blocks_divide",
        "assert [160] == []",
    ),
    Fault(
        "uneven FP8 blocks",
        "A recipe's model could have such sizes too",
        "recipes/preflight/fit.py",
        "    fp8_matrices(config, hf_config, text)\n",
        "",
        "tests/recipes/test_preflight.py::test_fp8_blocks_that_do_not_divide_a_workers_matrices_are_refused[72b]",
        "assert [1, 2",
    ),
    Fault(
        "an empty storage is shared",
        "Weights kept in FP8 by the distributed optimiser",
        "rollout/weight_sync/memory.py",
        "        if storage.nbytes() < tensor.nbytes:\n",
        "        if False:\n",
        "tests/rollout/test_network.py::test_a_tensor_whose_elements_are_elsewhere_is_not_shared",
        "DID NOT RAISE",
    ),
    Fault(
        "parameters in FP8",
        "Weights kept in FP8 by the distributed optimiser",
        "megatron_ext/precision.py",
        '            "fp8": self.format,\n',
        '            "fp8": self.format,\n            "fp8_param": True,\n',
        "tests/megatron_ext/test_precision.py::test_every_field_reaches_megatron_core",
        "assert not True",
    ),
    Fault(
        "queues chosen too late",
        "`CUDA_DEVICE_MAX_CONNECTIONS` was set after",
        "megatron_ext/platform/cuda.py",
        '    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")\n    if not torch.cuda.is_available():\n',
        "    is_there = torch.cuda.is_available()\n"
        '    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")\n    if not is_there:\n',
        "tests/rollout/test_gpu_engine.py::"
        "test_a_rank_chooses_one_hardware_queue_before_cuda_starts_and_engines_do_not_inherit_it",
        "assert [None] == ['1']",
    ),
    Fault(
        "queues inherited",
        "`CUDA_DEVICE_MAX_CONNECTIONS` was set after",
        "rollout/engine.py",
        '    "CUDA_DEVICE_MAX_CONNECTIONS",\n',
        "",
        "tests/rollout/test_gpu_engine.py::"
        "test_a_rank_chooses_one_hardware_queue_before_cuda_starts_and_engines_do_not_inherit_it",
        "assert 'CUDA_DEVICE_MAX_CONNECTIONS' not in",
    ),
    Fault(
        "contexts on every GPU",
        "Every engine worker took a CUDA context",
        "rollout/weight_sync/cuda_ipc.py",
        "    return torch.UntypedStorage._new_shared_cuda(\n        own,\n",
        "    return torch.UntypedStorage._new_shared_cuda(\n        source,\n",
        f"{FAKE_CUDA}[another GPU]",
        "AssertionError",
    ),
    Fault(
        "no word of peer access",
        "Every engine worker took a CUDA context",
        "rollout/weight_sync/cuda_ipc.py",
        "    if source != own and not torch.cuda.can_device_access_peer(own, source):\n",
        "    if False:\n",
        f"{FAKE_CUDA}[no peers]",
        "AssertionError",
    ),
    Fault(
        "one guess for all that processes keep",
        "The preflight counted contexts",
        "recipes/preflight/memory_plan.py",
        "    return int(trainer * GIB) + slots, int(engine * GIB)\n",
        "    return 5 * GIB, 0\n",
        "tests/recipes/test_preflight.py::"
        "test_what_processes_keep_of_a_gpu_is_counted_by_process_group_and_slot",
        "5.0 ==",
    ),
    Fault(
        "recipes that fill the GPU",
        "The preflight counted contexts",
        "conf/recipe/safework_72b.yaml",
        "  kv_cache_gib: 29.0 ",
        "  kv_cache_gib: 31.0 ",
        "tests/recipes/test_preflight.py::test_every_rank_of_a_replica_is_there_and_fits[72b]",
        "assert all(",
    ),
    Fault(
        "new slots at each start of an engine",
        "Killed engines left the former slots",
        "rollout/weight_sync/network.py",
        "    if former is not None and former.shape[1] == plan.slot_bytes[rank]:\n        return former\n",
        "",
        f"{FAKE_CUDA}[restart]",
        "bytes of GPU memory are lost",
    ),
    Fault(
        "no first collective",
        "The first operation of the sync's NCCL group",
        "rollout/vllm_platform.py",
        "    dist.all_reduce(torch.zeros(1, device=_cuda_device()), group=nccl_group)\n",
        "",
        "tests/rollout/test_sync_ends.py::test_a_sync_of_any_layouts_ends",
        "Deadlock",
    ),
    Fault(
        "forked workers",
        "On a GPU vLLM forked its workers",
        "rollout/engine.py",
        '        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",\n',
        "",
        "tests/rollout/test_gpu_engine.py::test_workers_are_spawned_so_that_they_end_with_their_engine",
        "VLLM_WORKER_MULTIPROC_METHOD",
    ),
    Fault(
        "workers outlive their engine",
        "On a GPU vLLM forked its workers",
        "rollout/engine_server.py",
        'if __name__ == "__mp_main__":\n    die_with_engine()\n',
        "",
        "tests/rollout/test_vllm.py::test_nothing_outlives_an_owner_that_is_killed",
        "assert not alive",
    ),
    Fault(
        "vLLM's own scheduling",
        "vLLM's second model runner",
        "rollout/engine_server.py",
        "        async_scheduling=settings.rollout.async_scheduling,\n",
        "        async_scheduling=None,\n",
        "tests/rollout/test_gpu_engine.py::test_vllm_works_on_a_gpu_as_on_a_cpu_unless_told_otherwise[changes0]",
        "assert None is False",
    ),
    Fault(
        "vLLM's own model runner",
        "vLLM's second model runner",
        "rollout/engine.py",
        '        "VLLM_USE_V2_MODEL_RUNNER": "1" if settings.rollout.model_runner_v2 else "0",\n',
        "",
        "tests/rollout/test_gpu_engine.py::test_vllm_works_on_a_gpu_as_on_a_cpu_unless_told_otherwise[changes0]",
        "VLLM_USE_V2_MODEL_RUNNER",
    ),
    Fault(
        "undefined padding",
        "After sleep the padding of parameters",
        "rollout/weight_sync/worker.py",
        "        for padding in plan.padding:\n            padding.zero_()\n",
        "",
        SLEEP,
        "slept once",
    ),
    Fault(
        "undefined key-value cache",
        "After sleep the padding of parameters",
        "rollout/engine_server.py",
        '        if "kv_cache" in tags:\n            self.weights.zero_cache()\n',
        "",
        SLEEP,
        "log-probabilities are not finite",
    ),
    Fault(
        "gradients while engines start",
        "Engines were awake while the optimiser",
        "recipes/training/setup.py",
        "    release_gradients(model)\n    return model\n",
        "    return model\n",
        "tests/recipes/test_loop.py::test_gradients_have_no_memory_while_engines_start_and_generate",
        'assert held["start"] == [0]',
    ),
    Fault(
        "awake before the first sync",
        "Engines were awake while the optimiser",
        "recipes/training/setup.py",
        "            rollouts.sleep()\n",
        "",
        "tests/recipes/test_loop.py::test_engines_sleep_until_the_first_sync",
        "assert ['optimizer'",
    ),
    Fault(
        "a part of a node's memory",
        "Jobs had neither all memory",
        "slurm/safework_72b.sh",
        "--cpus-per-task=8 --exclusive --mem=0\n",
        "--cpus-per-task=8\n",
        "tests/slurm/test_scripts.py::"
        "test_the_heterogeneous_job_serves_its_judges_and_trains_on_every_gpu",
        "assert [False, True] == [True, True]",
    ),
    Fault(
        "no host copies",
        "The preflight left out the host copies",
        "recipes/preflight/memory_plan.py",
        '        "checkpoint": weights + optimizer + critic,\n',
        "",
        "tests/recipes/test_preflight.py::"
        "test_each_phase_has_what_is_awake_in_it_and_the_rest_sleeps_on_the_host",
        "checkpoint",
    ),
    Fault(
        "16 tokens for block scaling",
        "FP8 with block scaling gathered BF16",
        "megatron_ext/precision.py",
        '        return 128 if self.recipe == "blockwise" else 16\n',
        "        return 16\n",
        "tests/megatron_ext/test_precision.py::test_the_tokens_of_a_rank_fill_blocks",
        "assert 16 == 128",
    ),
    Fault(
        "16 tokens where Transformer Engine wants 128",
        "FP8 with block scaling gathered BF16",
        "megatron_ext/precision.py",
        '        return 128 if self.recipe == "blockwise" else 16\n',
        "        return 16\n",
        "tests/te/test_layers.py::test_block_scaling_gathers_fp8_where_ranks_have_whole_blocks",
        "assert 16 == 128",
    ),
    Fault(
        "a toolkit of the site",
        "Another cuDNN of the site",
        "slurm/library.sh",
        "  unset CUDA_HOME CUDA_PATH\n",
        "",
        SITE_FILE,
        "assert 'toolkit none none' in",
    ),
    Fault(
        "another cuDNN passes a node's check",
        "Another cuDNN of the site",
        "recipes/node_check/checks.py",
        "    if foreign:\n",
        "    if False:\n",
        "tests/recipes/test_node_check.py::"
        "test_another_cudnn_is_found_where_transformer_engine_and_the_linker_look",
        "DID NOT RAISE",
    ),
    Fault(
        "the site's cuDNN first",
        "Another cuDNN of the site",
        "megatron_ext/platform/cuda.py",
        '        os.environ["CUDNN_HOME"] = folder\n',
        "        pass\n",
        "tests/test_gpu_static.py::test_transformer_engine_finds_torch_s_cudnn_first",
        "ValueError",
    ),
    Fault(
        "nvcc of another release",
        "CUDA's compilers were pinned",
        "pins.txt",
        "nvidia-cuda-nvcc==13.0.88\n",
        "nvidia-cuda-nvcc==13.5.37\n",
        "tests/test_packaging.py::test_cuda_s_compilers_are_of_the_runtime_s_release",
        "13.5.37",
    ),
    Fault(
        "a guessed bound of memory",
        "Bounds of speed and memory were guesses",
        "tests/gpu/test_fp8.py",
        "    assert 0.9 * estimate < step_peak < (1 + margin) * estimate\n",
        "    assert abs(step_peak - estimate) < 0.1 * estimate\n",
        "tests/test_gpu_rehearsal.py::test_a_peak_is_held_against_the_estimate",
        "DID NOT RAISE",
    ),
    Fault(
        "frozen by Transformer Engine's names",
        "`model.frozen` with a norm's name",
        "megatron_ext/model.py",
        '    return unfused_name(f"{match[1]}.{layer}{name[match.end() :]}")\n',
        '    return f"{match[1]}.{layer}{name[match.end() :]}"\n',
        "tests/te/test_layers.py::test_frozen_names_mean_the_same_on_both_platforms",
        "requires_grad",
    ),
    Fault(
        "FP32 over context-parallel ranks",
        "`precision=fp32` with `parallel.context`",
        "megatron_ext/platform/features.py",
        "        has_fp32_context_parallel=False,\n",
        "        has_fp32_context_parallel=True,\n",
        "tests/recipes/test_config.py::test_impossible_values_name_field_value_and_remedy",
        "DID NOT RAISE",
    ),
    Fault(
        "FP32 attention that is not there",
        "`precision=fp32` with `parallel.context`",
        "megatron_ext/platform/features.py",
        "        has_fp32_context_parallel=False,\n",
        "        has_fp32_context_parallel=True,\n",
        "tests/te/test_layers.py::test_what_a_gpu_has_no_attention_for_is_refused",
        "torch.float32 True",
    ),
    Fault(
        "an engine's argument that vLLM lacks",
        "Calls into vLLM's GPU build",
        "rollout/engine_server.py",
        "        mm_processor_cache_gb=0,\n",
        "        mm_processor_cache_gib=0,\n",
        "tests/test_vllm_contract.py::test_engine_arguments_are_fields_of_vllms",
        "mm_processor_cache_gib",
    ),
    Fault(
        "a call that vLLM's method does not take",
        "Calls into vLLM's GPU build",
        "rollout/engine_server.py",
        "self.llm.sleep(level=",
        "self.llm.sleep(depth=",
        "tests/test_vllm_contract.py::test_calls_of_the_engine_fit_its_methods",
        "no argument depth",
    ),
    Fault(
        "an option that vllm serve lacks",
        "What a judge's server asks",
        "rewards/serve.py",
        '"--enable-sleep-mode"',
        '"--enable-sleep"',
        "tests/rewards/test_serve_contract.py::test_vllm_serve_takes_the_command",
        "no option --enable-sleep",
    ),
    Fault(
        "a variable that vllm serve lacks",
        "What a judge's server asks",
        "rewards/serve.py",
        '"VLLM_SERVER_DEV_MODE"',
        '"VLLM_DEV_MODE"',
        "tests/rewards/test_serve_contract.py::test_variables_of_a_server_are_vllms",
        "VLLM_SERVER_DEV_MODE",
    ),
    Fault(
        "a path that vllm serve lacks",
        "What a judge's server asks",
        "rewards/client.py",
        '"/sleep?',
        '"/v1/sleep?',
        "tests/rewards/test_serve_contract.py::test_vllm_has_the_paths_that_we_ask",
        "/v1/sleep",
    ),
    Fault(
        "the chat layout's tower in BF16",
        "The tower of InternVL's chat layout",
        "megatron_ext/models/internvl3.py",
        "    return hf_config.architectures[0] == CHAT\n",
        "    return False\n",
        "tests/test_vllm_contract.py::test_towers_are_quantised_where_their_families_say_so[InternVLChatModel]",
        "assert False == True",
    ),
    Fault(
        "the chat layout's tower left out",
        "The tower of InternVL's chat layout",
        "megatron_ext/models/internvl3.py",
        "    return hf_config.architectures[0] == CHAT\n",
        "    return False\n",
        "tests/recipes/test_preflight.py::test_the_tower_counts_where_vllm_quantises_it",
        "tower's feed-forward",
    ),
    Fault(
        "modules under set -u",
        "Modules failed under `set -u`",
        "slurm/library.sh",
        "  set +u\n",
        "",
        SITE_FILE,
        "NOT_SET: unbound variable",
    ),
    Fault(
        "jobs from the root alone",
        "Modules failed under `set -u`",
        "slurm/train.sh",
        'cd "$(dirname "$script")/.."\n',
        "",
        "tests/slurm/test_scripts.py::test_a_bad_node_is_left_out_and_jobs_may_be_submitted_from_any_folder",
        "library.sh: No such file",
    ),
    Fault(
        "an old driver",
        "Nothing looked at the nodes",
        "recipes/node_check/checks.py",
        '    if int(version.partition(".")[0]) < least:\n',
        "    if False:\n",
        "tests/recipes/test_node_check.py::test_a_driver_that_is_too_old_is_told",
        "DID NOT RAISE",
    ),
    Fault(
        "GPUs without peer access",
        "Nothing looked at the nodes",
        "recipes/node_check/__main__.py",
        '        yield lambda: checks.peer_access(nvidia_smi("topo", "-p2p", "r"))\n',
        "        pass\n",
        "tests/recipes/test_node_check.py::test_the_gpu_checks_ask_nvidia_smi",
        "assert 4 == 5",
    ),
    Fault(
        "a job with a part of the memory",
        "Nothing looked at the nodes",
        "recipes/node_check/checks.py",
        "    if least_share is not None and allowed < least_share * total:\n",
        "    if False:\n",
        "tests/recipes/test_node_check.py::test_a_job_without_the_node_s_memory_is_told",
        "DID NOT RAISE",
    ),
    Fault(
        "nodes that are used unseen",
        "Nothing looked at the nodes",
        "slurm/library.sh",
        "  check_nodes\n",
        "",
        "tests/recipes/test_slurm.py::test_a_bad_node_is_named_and_where_wanted_excluded",
        "bad nodes node8",
    ),
    Fault(
        "errors without rank, host and phase",
        "Errors of NCCL and CUDA",
        "recipes/run/failure.py",
        '            return f"{where}: {cause.meaning}:',
        '            return f"{cause.meaning}:',
        "tests/recipes/test_failure.py::test_an_error_is_told_with_rank_host_phase_meaning_and_remedy[0]",
        "rank 13 on node7, in train: ",
    ),
    Fault(
        "no word of a rank that was aborted",
        "Errors of NCCL and CUDA",
        "recipes/run/failure.py",
        "            message = explain(line, _place(path, text))\n",
        "            message = None\n",
        "tests/recipes/test_failure.py::test_the_logs_of_ranks_that_were_aborted_name_the_first",
        "assert message is not None",
    ),
    Fault(
        "no MFU",
        "No MFU, tokens per second",
        "recipes/run/utilisation.py",
        '        metrics["throughput/mfu"] = flops / train_seconds / ranks / peak_flops\n',
        "        pass\n",
        "tests/recipes/test_utilisation.py::test_throughput_is_of_the_step_and_all_processes_and_mfu_of_its_training_phase_and_ranks",
        "throughput/mfu",
    ),
    Fault(
        "no tokens per second",
        "No MFU, tokens per second",
        "recipes/run/run.py",
        "            **utilisation.throughput(\n"
        "                self.tokens,\n"
        "                self.flops,\n"
        "                seconds,\n"
        "                ranks=len(of_ranks),\n"
        "                processes=self.processes,\n"
        "                peak_flops=peak_flops,\n"
        "            ),\n",
        "",
        "tests/recipes/test_run_records.py::"
        "test_a_step_s_line_has_the_seconds_of_its_phases_and_the_next_one_only_its_own",
        "KeyError: 'throughput/tokens_per_second_per_rank'",
    ),
    Fault(
        "no memory",
        "No MFU, tokens per second",
        "recipes/run/run.py",
        "            **utilisation.memory([memory for _, _, _, memory in of_ranks]),\n",
        "",
        "tests/recipes/test_run_records.py::"
        "test_a_step_s_line_has_the_seconds_of_its_phases_and_the_next_one_only_its_own",
        "KeyError: 'memory/rank_peak_gib'",
    ),
    Fault(
        "no judges from the hub",
        "No way to download models and judges",
        "recipes/download.py",
        "            wanted[Path(server.model)] = server.hub\n",
        "            pass\n",
        "tests/recipes/test_download.py::test_a_recipe_names_its_model_and_the_authors_judges",
        "safework_safety_7b",
    ),
    Fault(
        "nothing from the hub",
        "No way to download models and judges",
        "recipes/download.py",
        "            snapshot_download(step.repository, revision=step.commit, local_dir=step.folder, "
        "ignore_patterns=NOT_NEEDED)\n",
        "            pass\n",
        "tests/recipes/test_download.py::test_a_repository_is_fetched_once",
        "FileNotFoundError",
    ),
    Fault(
        "a judge for every row",
        "No run without judges",
        "conf/rewards/rules.yaml",
        "  value: {rule: rule_check}   # the rule that a row's `check` names\n",
        "  value: {template: value, server: value}\nservers:\n  value: {model: models/safework_value_72b}\n",
        "tests/recipes/test_trial.py::test_a_large_recipe_can_begin_with_rules_and_without_judges[rl_safety]",
        "== {}",
    ),
    Fault(
        "what is measured is not written",
        "What a GPU measures had no way",
        "recipes/preflight/calibrate.py",
        "        texts[file] = text[:start] + new + text[stop:]\n",
        "        texts[file] = text\n",
        "tests/recipes/test_calibrate.py::test_measured_values_take_the_place_of_estimates[two_nodes]",
        "44.7",
    ),
    Fault(
        "a check reads a setting that is gone",
        "The GPU checks' own logic was not run",
        "tests/gpu/test_fp8.py",
        "    margin = FREE_GIB / (DEVICE_MEMORY.device_memory_gib - FREE_GIB) / 2\n",
        "    reserve = DEVICE_MEMORY.reserve_gib\n"
        "    margin = reserve / (DEVICE_MEMORY.device_memory_gib - reserve) / 2\n",
        "tests/test_gpu_rehearsal.py::test_a_peak_is_held_against_the_estimate",
        "reserve_gib",
    ),
    Fault(
        "a check's engine without a stop token",
        "The GPU checks' own logic was not run",
        "tests/gpu/test_decoding.py",
        "Sampling(tokens, (config.vocab_size - 1,))",
        "Sampling(tokens, ())",
        GPU_CHECKS,
        "sampling.stop_token_ids is empty",
    ),
    Fault(
        "make takes the CPU environment",
        "`make gpu-check` would have cleared",
        "Makefile",
        "EXTRA ?= $(or $(MADE_WITH),cpu)\n",
        "EXTRA ?= cpu\n",
        "tests/test_setup_env.py::test_every_target_keeps_the_extra_that_is_there[.installed-gpu-gpu-check]",
        "setup_env.py --extra gpu --venv .venv",
    ),
    Fault(
        "another environment is replaced",
        "`make gpu-check` would have cleared",
        "setup_env.py",
        "        other_extra(environment, extra),\n",
        "",
        "tests/test_setup_env.py::test_an_environment_is_not_replaced_by_one_of_another_extra",
        "was made with EXTRA=gpu",
    ),
    Fault(
        "an isolated build",
        "`transformer_engine_torch` did not build",
        "setup_env.py",
        '        "--no-build-isolation",\n',
        "",
        "tests/test_setup_env.py::test_torch_comes_first_then_the_build_then_the_rest_and_the_wheel_is_kept",
        "--no-build-isolation",
    ),
    Fault(
        "a build by the toolkit's headers",
        "`transformer_engine_torch` did not build",
        "setup_env.py",
        '    "NVTE_BUILD_USE_NVIDIA_WHEELS": "1",\n',
        "",
        "tests/test_setup_env.py::test_torch_comes_first_then_the_build_then_the_rest_and_the_wheel_is_kept",
        "KeyError: 'NVTE_BUILD_USE_NVIDIA_WHEELS'",
    ),
    Fault(
        "a build without crt",
        "`transformer_engine_torch` did not build",
        "setup_env.py",
        '    "nvidia-cuda-crt",\n',
        "",
        "tests/test_setup_env.py::test_torch_comes_first_then_the_build_then_the_rest_and_the_wheel_is_kept",
        "nvidia-cuda-crt",
    ),
    Fault(
        "nobody looks for Python.h",
        "`transformer_engine_torch` did not build",
        "setup_env.py",
        '            no_python_header(Path(sysconfig.get_path("include"))),\n',
        "",
        "tests/test_setup_env.py::test_all_that_a_gpu_machine_lacks_is_told_before_anything_is_fetched",
        "Python.h",
    ),
    Fault(
        "an image that is made otherwise",
        "No definition of an image",
        "slurm/container/safework.def",
        "    pins.txt /opt/safework/\n",
        "",
        "tests/slurm/test_container.py::test_both_definitions_make_the_same_image",
        "pins.txt",
    ),
    Fault(
        "an image without what make needs",
        "No definition of an image",
        "slurm/container/Dockerfile",
        "COPY Makefile setup.py setup_env.py pyproject.toml pins.txt ",
        "COPY Makefile setup_env.py pyproject.toml pins.txt ",
        "tests/slurm/test_container.py::test_the_image_holds_what_the_environment_is_made_from",
        "setup.py",
    ),
    Fault(
        "a login shell without the image's path",
        "Enroot, and so Pyxis, starts programs",
        "slurm/container/path.sh",
        "PATH=/opt/safework/.venv/bin:$PATH\n",
        "",
        "tests/slurm/test_container.py::test_a_login_shell_has_the_same_path",
        "AssertionError",
    ),
    Fault(
        "wheels in the host's /tmp",
        "`apptainer build` unpacked the wheels",
        "slurm/container/install.sh",
        'export TMPDIR=$PWD/tmp\nmkdir "$TMPDIR"\nmake env EXTRA=gpu\nrm -r "$TMPDIR"\n',
        "make env EXTRA=gpu\n",
        "tests/slurm/test_container.py::test_the_image_gets_debians_packages_and_then_the_environment",
        "assert temporary.parent == inside",
    ),
    Fault(
        "a stranger is counted",
        "A port scanner's connection",
        "recipes/node_check/clock.py",
        "            connection.settimeout(QUESTION_SECONDS)\n",
        "            connection.settimeout(QUESTION_SECONDS)\n            answered.append(connection)\n",
        "tests/recipes/test_node_check.py::test_strangers_are_not_counted_and_nobody_waits_for_them",
        "assert ",
    ),
    Fault(
        "any question is a node's",
        "A port scanner's connection",
        "recipes/node_check/clock.py",
        "                if questions.read(len(QUESTION)) != QUESTION:\n                    return\n",
        "                questions.read(len(QUESTION))\n",
        "tests/recipes/test_node_check.py::test_strangers_are_not_counted_and_nobody_waits_for_them",
        "assert ",
    ),
    Fault(
        "everybody waits for a stranger",
        "A port scanner's connection",
        "recipes/node_check/clock.py",
        "            threading.Thread(target=answer, args=[connection], daemon=True).start()\n",
        "            answer(connection)\n",
        "tests/recipes/test_node_check.py::test_strangers_are_not_counted_and_nobody_waits_for_them",
        "assert ",
    ),
    Fault(
        "kept pinned memory is not rounded",
        "Pinned memory of more than 1 MiB was not rounded",
        "megatron_ext/platform/cuda.py",
        'ALLOCATOR_SETTING = "pinned_max_cached_size_mb:64"',
        'ALLOCATOR_SETTING = "pinned_max_round_threshold_mb:1"',
        "tests/test_gpu_static.py::test_torch_rounds_all_pinned_memory_that_it_keeps",
        "by default all that is kept is rounded",
    ),
    Fault(
        "FP8 matrices that vLLM pads",
        "FP8 engines of Qwen2.5-VL-7B could not start",
        "recipes/preflight/fit.py",
        '{"fp8_per_tensor": 16, PER_CHANNEL: 16, "fp8_per_block": 128}',
        '{PER_CHANNEL: 1, "fp8_per_block": 128}',
        "tests/recipes/test_preflight.py::test_inputs_that_vllm_s_kernel_for_h100_would_pad_are_refused",
        "no multiples of 16",
    ),
    Fault(
        "sums in the switch",
        "Engines of four to eight GPUs summed in NVLink's switch",
        "rollout/vllm_platform.py",
        '    environment = {SUMS_IN_THE_SWITCH: os.environ.get(SUMS_IN_THE_SWITCH, "0")}\n',
        "    environment: dict[str, str] = {}\n",
        "tests/recipes/test_engine_settings.py::test_each_node_has_as_many_and_an_engines_own_gpus_come_first",
        "VLLM_ALLREDUCE_USE_SYMM_MEM",
    ),
    Fault(
        "every stage from the base model",
        "A recipe's or a command line's `model.path` held for every stage",
        "recipes/launch/pipeline.py",
        """        stage_arguments.append(f"model.path={quoted(str(folder / previous / 'hf'))}")\n""",
        "",
        "tests/recipes/test_ladder.py::test_model_path_is_that_of_the_first_stage_alone",
        "models/own",
    ),
)  # fmt: skip


def copy_of(folder: Path) -> Path:
    """The working tree without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in LINKED:
        if (ROOT / name).exists():
            (folder / name).symlink_to((ROOT / name).resolve())
    return folder


def try_out(fault: Fault, tree: Path) -> tuple[str, str]:
    """What the test does without the remedy, and its output."""
    file = tree / fault.file
    present = file.read_text()
    if present.count(fault.text) != 1:
        return "STANDS NOT ONCE", f"{fault.file} has {present.count(fault.text)} times {fault.text!r}"
    file.write_text(present.replace(fault.text, fault.former))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", fault.test]
    try:
        done = subprocess.run(
            command, cwd=tree, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
    finally:
        shutil.copy2(ROOT / fault.file, file)
    if done.returncode == 0:
        return "STILL PASSES", done.stdout
    failed_as_it_should = done.returncode == 1 and fault.says in done.stdout
    return "fails" if failed_as_it_should else "FAILS OTHERWISE", done.stdout + done.stderr


def main(names: Sequence[str]) -> int:
    unknown = set(names) - {fault.name for fault in FAULTS}
    if unknown:
        sys.exit(f"no fault has the name {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if not names or fault.name in names]
    as_they_should = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of(Path(folder))
        for fault in chosen:
            verdict, output = try_out(fault, tree)
            print(f"{verdict:16} {fault.name}: {fault.test}", flush=True)
            if verdict == "fails":
                as_they_should += 1
            else:
                print(output[-SHOWN:], flush=True)
    print(f"{as_they_should} of {len(chosen)} fail as they should")
    return 0 if as_they_should == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
