"""The gates' own machinery: descriptions against Triton's JIT, checks against seeded faults, the model by hand."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gated_kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from gates import cases, checks, describe, model, pool, predictions, report, sass, work  # noqa: E402
from gates.checks import Expectation  # noqa: E402
from zsvr_kernels._triton import SHARED_MEMORY, Launch, is_interpreted  # noqa: E402

if is_interpreted:
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)
HERE = ".".join(__import__("triton").__version__.split(".")[:2])


def compiled_for(target: str) -> Any:
    return make_backend(GPUTarget("cuda", 90, 32) if target == "sm_90" else GPUTarget("hip", "gfx942", 64))


def assert_as_the_jit_specialises(launch: Launch, target: str) -> None:
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, compiled_for(target))
    _, specialised, _ = binder(**launch.arguments)
    got = describe.describe(launch, target)
    for parameter, (kind, mark) in zip(kernel.params, specialised, strict=True):
        name = parameter.name
        assert got["signature"][name] == kind, name
        assert (kind == "constexpr") == (name in got["constants"]), name
        if kind != "constexpr":
            assert got["marks"].get(name, "") == (mark or ""), name


# ---- descriptions ----

INTEGERS = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool])
def test_descriptions_specialise_as_the_jit_does(target, dtype):
    whole = torch.zeros(64, dtype=dtype)
    for number, integer in enumerate(INTEGERS):
        x = whole[number % 3 :] if number < 6 else whole[16:]
        arguments = {
            "p_x": x, "p_absent": None if number % 2 else whole, "flag": number % 2 == 0, "one": integer,
            "wide": integer, "huge": 2**40 + number, "ratio": 1.0 if number % 2 else 0.5, "plain": integer,
            "unaligned": integer, "text": "ieee",
        }  # fmt: skip
        assert_as_the_jit_specialises(Launch(gated_kernels._arguments_kernel, (1,), arguments), target)


@pytest.mark.parametrize("options", [{"num_warps": 2}, {"num_stages": 1, "enable_fp_fusion": False}])
def test_descriptions_have_the_options_that_a_launch_passes(options):
    class Kernel:
        params, fn = gated_kernels._rows_kernel.params, gated_kernels._rows_kernel.fn
        passed: dict[str, Any]

        def __getitem__(self, grid):
            return lambda **passed: setattr(self, "passed", passed)

    kernel, arguments = Kernel(), rows(64).arguments
    launch = Launch(kernel, (1,), arguments, options)
    launch.run()
    passed = {name: x for name, x in kernel.passed.items() if name not in arguments}
    assert passed == describe.describe(launch, "sm_90")["options"]


def test_descriptions_know_which_tensors_fit_two_gigabytes():
    for bytes in (2**31 - 1, 2**31):
        arguments = rows(64).arguments | {"p_x": torch.empty(bytes, dtype=torch.int8, device="meta")}
        launch = Launch(gated_kernels._rows_kernel, (1,), arguments)
        assert_as_the_jit_specialises(launch, "gfx942")
        assert ("S" in describe.describe(launch, "gfx942")["marks"]["p_x"]) == (bytes < 2**31)


def test_descriptions_are_json_and_named_by_content():
    first, second = (describe.describe(product(128, 128, 64, n_k=n), "sm_90") for n in (1024, 1040))
    assert json.loads(json.dumps(first)) == first
    assert describe.key(first) == describe.key(second)  # both are multiples of 16, which is all that code sees
    assert describe.key(first) != describe.key(describe.describe(product(128, 128, 64, n_k=1025), "sm_90"))
    assert describe.key(first | {"folder": "/elsewhere"}) == describe.key(first)
    with pytest.raises(TypeError, match=r"not its parameters: \['p'\]; not given: \['D'\]"):
        wrong = {name: x for name, x in rows(64).arguments.items() if name != "D"} | {"p": 1}
        describe.describe(Launch(gated_kernels._rows_kernel, (1,), wrong), "sm_90")
    with pytest.raises(TypeError, match="Triton dtype, got list"):
        describe.describe(Launch(gated_kernels._rows_kernel, (1,), rows(64).arguments | {"D": [64]}), "sm_90")


# ---- compiles and checks ----


def product(
    M: int, N: int, K: int, *, n_k: int = 1024, dtype=torch.bfloat16, warps: int = 4, stages: int = 3
) -> Launch:
    a = torch.empty(n_k, max(M, N), dtype=dtype, device="meta")
    out = torch.empty(M, N, dtype=dtype, device="meta")
    arguments = {"p_a": a, "p_b": a, "p_out": out, "n_k": n_k, "scale": 0.5, "M": M, "N": N, "K": K}
    precision = "ieee" if dtype == torch.float32 else "tf32"
    options = {"num_warps": warps, "num_stages": stages}
    return Launch(gated_kernels._product_kernel, (1,), arguments | {"PRECISION": precision}, options)


def rows(stride: int, D: int = 64) -> Launch:
    x = torch.empty(1024, D, dtype=torch.bfloat16, device="meta")
    index = torch.empty(1024, dtype=torch.int32, device="meta")
    arguments = {"p_x": x, "p_index": index, "p_out": x, "stride": stride, "n": 1024, "D": D, "BLOCK": 64}
    return Launch(gated_kernels._rows_kernel, (16,), arguments, {"num_warps": 4})


LAUNCHES = {
    "good": product(128, 128, 64),
    "greedy": product(128, 128, 64, stages=8),
    "spills": product(128, 256, 16, stages=1),
    "exact": product(32, 32, 16, dtype=torch.float32),
    "small": product(32, 32, 32, warps=1),
    "rows": rows(64),
    "odd rows": rows(65),
}


@functools.cache
def compiled() -> dict[tuple[str, str], dict[str, Any]]:
    wanted = [(name, target) for name in LAUNCHES for target in ("sm_90",)]
    wanted += [("good", "sm_80"), ("good", "gfx942"), ("rows", "gfx942")]
    jobs = {}
    for name, target in wanted:
        description = describe.describe(LAUNCHES[name], target)
        jobs[name, target] = pool.Job(HERE, target, describe.key(description), description)
    results, _ = pool.compile_all(list(jobs.values()), threads=2)
    return {what: results[job] for what, job in jobs.items()}


MATRIX, ROWS = Expectation(matrix=True), Expectation(rows=True)


def test_a_good_kernel_passes_every_gate():
    for target in ("sm_80", "sm_90", "gfx942"):
        assert checks.failures(target, compiled()["good", target], Expectation(matrix=True, rows=True)) == []
        assert compiled()["good", target]["registers"] > 32
    for target in ("sm_90", "gfx942"):
        assert checks.failures(target, compiled()["rows", target], ROWS) == []


def test_instructions_of_a_known_kernel():
    found = compiled()["good", "sm_90"]
    counts, loop = found["counts"], found["loop"]
    # One block of 128x128 multiplies 2*128*128*64 per step, and its epilogue has 128*128 exponentials on 128 threads.
    assert loop["mma_flops"] == 2 * 128 * 128 * 64
    assert counts["EX2"] == 128 and "EX2" not in loop
    assert loop["LDGSTS.128"] == loop["LDGSTS"] == 2 * 128 * 64 * 2 // (16 * 128)
    assert found["stack"] == 0 and "STL" not in counts
    assert compiled()["small", "sm_90"]["counts"]["HMMA"] > 0


@pytest.mark.parametrize(
    ("name", "due", "message"),
    [
        ("greedy", MATRIX, "bytes of shared memory: got 262144, allowed 232448"),
        ("spills", MATRIX, "bytes of stack (spills): got"),
        ("exact", MATRIX, "matrix instructions (HGMMA): got 0 (but {'FFMA': "),
        ("small", MATRIX, "matrix instructions (HGMMA): got 0 (but {'HMMA': "),
        ("odd rows", ROWS, "16-byte loads of rows: got 0, allowed 1 or more"),
        ("odd rows", ROWS, "2-byte loads: got"),
    ],
)
def test_seeded_faults_are_found(name, due, message):
    assert any(message in failure for failure in checks.failures("sm_90", compiled()[name, "sm_90"], due))


def test_small_products_may_use_the_older_instruction():
    assert checks.failures("sm_90", compiled()["small", "sm_90"], Expectation(matrix=True, wgmma=False)) == []


def test_a_kernel_that_does_not_compile_is_a_failure():
    description = describe.describe(product(128, 128, 64), "sm_90")
    broken = description | {"constants": description["constants"] | {"M": 24}}
    absent = description | {"kernel": "_absent_kernel"}
    jobs = [pool.Job(HERE, "sm_90", name, d) for name, d in [("broken", broken), ("absent", absent)]]
    results, exact = pool.compile_all(jobs)
    for job in jobs:
        (failure,) = checks.failures("sm_90", results[job], MATRIX)
        assert failure.startswith("does not compile: "), failure
    assert exact[HERE].startswith(HERE)


def test_limits_without_a_compiler():
    found = {
        "shared": 1,
        "stack": 0,
        "spills": 0,
        "registers": 255,
        "num_warps": 16,
        "tensor_memory": 513,
        "counts": {},
    }
    wrong = checks.failures("sm_100", found, Expectation())
    assert wrong == [
        "registers of a block: got 131072, allowed 65536",
        "columns of tensor memory: got 513, allowed 512",
    ]
    found |= {"spills": 3, "num_warps": 8}
    assert checks.failures("gfx942", found, Expectation())[0] == "spilled vector registers: got 3, allowed 0"
    assert not any("SIMD" in failure for failure in checks.failures("gfx942", found, Expectation()))
    assert any("SIMD" in failure for failure in checks.failures("gfx942", found | {"registers": 264}, Expectation()))


def test_a_release_that_is_not_there_says_how_to_get_it():
    with pytest.raises(FileNotFoundError, match=r"make build/triton-2\.0/\.installed"):
        pool.interpreter("2.0")


def test_the_report_names_kernel_target_release_and_limit():
    description = describe.describe(LAUNCHES["greedy"], "sm_90")
    found = compiled()["greedy", "sm_90"]
    row = {
        "description": description, "key": "k", "target": "sm_90", "triton": "3.9.0", "cases": ["a/case", "b"],
        "found": found, "failures": checks.failures("sm_90", found, MATRIX),
    }  # fmt: skip
    (line,) = report.failures([row])
    for part in ("_product_kernel", "sm_90", "3.9.0", "a/case", "got 262144, allowed 232448", "num_stages=8"):
        assert part in line
    text = report.render(
        [row], {"commit": "0" * 40, "dirty": False, "triton": {"3.9": "3.9.0"}, "choice": "all launches"}
    )
    assert json.loads(report.as_json([row], {}))["rows"][0]["failures"] == row["failures"]
    assert "1 fail a gate" in text and "Compiled were all launches" in text and "a/case and 1 more" in text


def test_json_has_a_line_for_every_entry():
    for entries in ([{"a": 1}, {"b": [2]}], {"x": {"a": 1}, "y": None}):
        whole = {"schema": 1, "provenance": {"c": {}}, "rows": entries}
        text = report.by_lines(whole, "rows")
        assert json.loads(text) == whole and sum(line.startswith("  ") for line in text.splitlines()) >= len(entries)


# ---- disassembly ----

LISTING = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64] ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
"""


def test_disassembly_is_counted_by_kind_width_and_loop():
    found = sass.analyse(LISTING, num_warps=4)
    assert found["counts"] == {
        "all": 11, "LDG": 2, "LDG.128": 1, "LDG.16": 1, "HMMA": 1, "EX2": 1, "MUFU": 1, "LDGSTS": 1, "LDGSTS.128": 1,
        "STG": 1, "STG.64": 1, "mma_flops": 4 * 2 * 16 * 8 * 16,
    }  # fmt: skip
    assert found["loops"] == 1  # the outer loop holds another; a branch to itself is padding
    assert found["loop"]["all"] == 4 and found["loop"]["LDG.16"] == 1 and "LDGSTS" not in found["loop"]
    assert found["around"]["all"] == 3 and found["around"]["LDGSTS"] == 1  # what the outer loop has beside it
    assert sass.mma_flops(["HGMMA.64x128x16.F32.BF16"], 8) == 2 * (2 * 64 * 128 * 16)
    with pytest.raises(ValueError, match="no resource usage"):
        sass.usage("nothing")


# ---- the model ----

ROOFS = {
    name: model.Roof(value, "test")
    for name, value in {
        "sms": 100, "clock_ghz": 1.0, "mma_16_tflops": 100.0, "mma_tf32_tflops": 50.0, "fma_tflops": 10.0, "exp_t": 1.0,
        "issue_t": 1.0, "l1_tbs": 10.0, "l2_tbs": 5.0, "l2_rows_tbs": 2.0, "latency_us": 0.5, "launch_us": 3.0,
        "hbm_tbs": 2.0,
    }.items()
}  # fmt: skip
FOUND = {"num_warps": 4, "registers": 128, "shared": 50000, "counts": {"all": 1000}, "loop": {"all": 500},
         "around": None}  # fmt: skip


def test_blocks_of_a_multiprocessor():
    assert model.blocks_per_sm(registers=128, shared=0, num_warps=4) == 4  # 128*128 of 65536 registers each
    assert model.blocks_per_sm(registers=129, shared=0, num_warps=4) == 3  # allocated as 136
    assert model.blocks_per_sm(registers=32, shared=100000, num_warps=4) == 2
    assert model.blocks_per_sm(registers=32, shared=0, num_warps=4) == 16
    assert model.blocks_per_sm(registers=16, shared=0, num_warps=1) == 32
    assert model.blocks_per_sm(registers=255, shared=0, num_warps=16) == 0


def test_the_last_round_of_blocks_costs_a_whole_one():
    assert model.quantisation(100, 100) == 1.0
    assert model.quantisation(101, 100) == pytest.approx(2 / 1.01)
    assert model.quantisation(10, 100) == 10.0


def test_terms_by_hand():
    work = model.Work(hbm=20e6, l2=10e6, l2_rows=2e6, l1=100e6, mma=5e9, exponentials=4e6, iterations=9.0, steps=2.0)
    got = model.predict(work, 200, FOUND, ROOFS)
    # 1000 + 8*500 instructions of 800 warps; 4 blocks to a multiprocessor, so 200 start at once.
    expected = {"launch": 3.0, "hbm": 10.0, "l2": 3.0, "l1": 10.0, "latency": 1.0, "mma": 50.0, "fma": 0.0, "exp": 4.0,
                "issue": 4.0}  # fmt: skip
    assert got.terms == pytest.approx(expected)
    assert (got.us, got.bound) == (pytest.approx(53.0), "mma")
    assert got.serial_us == pytest.approx(3 + 10 + 50 + 4)


def test_instructions_of_nested_loops():
    found = FOUND | {"around": {"all": 100}}
    assert model.instructions(found, iterations=9.0, rounds=3.0) == 1000 + 8 * 500 + 2 * 100
    assert model.instructions(FOUND | {"loop": None}, iterations=9.0) == 1000


def test_what_binds_and_what_does_not():
    assert model.predict(model.Work(hbm=1e6), 100, FOUND, ROOFS).bound == "launch"
    exact = model.predict(model.Work(mma=5e9, mma_dtype="ieee"), 100, None, ROOFS)
    assert exact.bound == "fma" and exact.terms["fma"] == pytest.approx(500) and exact.terms["issue"] == 0
    assert model.predict(model.Work(mma=5e9, mma_dtype="tf32"), 100, None, ROOFS).terms["mma"] == pytest.approx(100)
    # 150 blocks on 100 multiprocessors: half of them work twice as long as the mean of 1.5 blocks would.
    assert model.predict(model.Work(mma=5e9), 150, None, ROOFS).terms["mma"] == pytest.approx(50 * 2 / 1.5)


# ---- cases ----


def kernels() -> set[str]:
    files = (ROOT / "zsvr_kernels").rglob("triton_*.py")
    return {name for path in files for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_every_kernel_is_gated_on_every_target(target):
    found = {launch.kernel.fn.__name__ for case in cases.gated() for launch in cases.launches(case, target)}
    assert found == kernels() == cases.DUE.keys()


def test_launches_are_described_as_the_jit_specialises_them():
    for target in ("sm_90", "gfx942"):
        for case in cases.gated():
            if case.dtype != "fp16":
                for launch in cases.launches(case, target):
                    assert_as_the_jit_specialises(launch, target)


def test_float32_is_not_due_on_the_matrix_unit_unless_asked_for():
    def due(dtype: str) -> Expectation:
        return cases.due(cases.launches(cases.Case("cross_frame_attention", "adm-32", 2, dtype, "fwd"), "sm_90")[0])

    assert due("bf16").matrix and not due("fp32").matrix and due("fp32").rows


def test_a_kernel_of_which_nothing_was_said_is_refused():
    with pytest.raises(KeyError, match="what is due of _rows_kernel"):
        cases.due(rows(64))


def test_slots_in_the_clip():
    assert cases.live_slots(cases.Case("trajectory_attention", "adm-32", 16, "bf16", "fwd")) == 16 * 5 - 2 * (2 + 1)
    assert cases.live_slots(cases.Case("trajectory_attention", "adm-32", 2, "bf16", "fwd")) == 4
    assert cases.live_slots(cases.Case("trajectory_attention", "adm-32", 16, "bf16", "fwd", "full")) == 256


# ---- predictions ----


def test_work_of_launches_by_hand():
    case = cases.Case("cross_frame_attention", "adm-32", 16, "bf16", "fwd")
    (launch,) = cases.launches(case, "sm_90")
    got = work.work(launch, case)
    # 1024 queries of 16 frames and 8 heads against 2 * 1024 keys of 64 channels, absent ones at the ends included.
    assert got.mma == 4 * 1024 * 2048 * 64 * 8 * 16 and got.exponentials == 1024 * 2048 * 8 * 16
    tokens, lse, table = 16 * 1024 * 512 * 2, 16 * 1024 * 8 * 4, 16 * 2 * 4
    assert got.hbm == 4 * tokens + lse + table
    case = cases.Case("trajectory_attention", "adm-32", 16, "bf16", "fwd", "full")
    (launch,) = cases.launches(case, "sm_90")
    # 16 bytes for each sample and channel: 4 corners of K and of V.
    assert work.work(launch, case).l1 == 16 * (16 * 16 * 1024) * 512


def test_useful_work_by_hand():
    case = cases.Case("cross_frame_attention", "adm-32", 16, "bf16", "bwd")
    assert predictions.useful(case)["flops"] == 2.5 * 4 * 512 * 1024**2 * 32
    assert predictions.peers(case) == {"fa3_like": 407, "concat_copies": 31}
    assert predictions.peers(cases.Case("link_score", "adm-32", 16, "bf16", "fwd")) == {}


def test_every_measured_case_has_a_committed_prediction():
    whole = json.loads((ROOT / "bench" / "predictions.json").read_text())
    assert whole["schema"] == predictions.SCHEMA and set(whole["roofs"]) == set(model.ROOFS)
    assert {case.key for case in cases.measured()} <= whole["cases"].keys()
    for name, entry in whole["cases"].items():
        assert name.startswith(f"{entry['op']}/{entry['level']}/T{entry['T']}/{entry['dtype']}/{entry['direction']}")
        assert set(entry["work"]) == {"flops", "exponentials", "bytes"} and all(k["compiled"] for k in entry["kernels"])
        for machine in model.ROOFS:
            got = entry["machines"][machine]
            assert len(got["kernels"]) == len(entry["kernels"]) > 0 and got["bound"] in model.TERMS
            assert got["us"] == pytest.approx(sum(kernel["us"] for kernel in got["kernels"]), abs=0.05)
            assert got["us"] <= got["serial_us"] + 0.05
            for kernel in got["kernels"]:
                terms = dict(kernel["terms_us"])
                launch = terms.pop("launch")
                assert set(terms) | {"launch"} == set(model.TERMS)
                assert kernel["us"] == pytest.approx(launch + max(terms.values()), abs=0.05)
