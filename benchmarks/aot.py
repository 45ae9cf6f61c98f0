"""``python -m benchmarks.aot``: what the compiler makes of every Triton kernel, without a GPU.

Each kernel and configuration (``aot_cases()`` of its file) is compiled for sm_80 and sm_90, and the machine code is
read: registers, stack, spills, shared memory, tensor-core instructions, 128-bit loads and stores, instructions. Some
numbers are laws (no stack, no spill, shared memory the chip has, no TF32 where fp32 was asked for); the others are held
against ``kernel_budget.toml``, which has a table per Triton version. Worse fails; better fails too until ``--update``
has written it down. Exit code 3 then, with kernel and number.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastlth_kernels.launch import AotCase

from fastlth import toml

BUDGET = Path(__file__).with_name("kernel_budget.toml")
MODULES = ("masked_step", "kth_magnitude", "batch", "masked_linear", "masked_conv")
SHARED = {80: 166_912, 90: 232_448}  # bytes a block may use: CUDA programming guide, table of compute capabilities
LOWER_IS_BETTER = ("registers", "shared", "instructions")
HIGHER_IS_BETTER = ("loads_128", "stores_128", "tensor_core")
SLACK = {"instructions": 0.05}  # share by which a number may differ

Numbers = dict[str, int]


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code: 0, 2 without Triton, 3 where a law or the budget is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="write the numbers found into kernel_budget.toml")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    asked = parser.parse_args(arguments)
    try:
        import triton
    except ModuleNotFoundError:
        print("Triton is not installed: nothing to compile", file=sys.stderr)
        return 2
    budget = tomllib.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    expected: dict[str, Numbers] | None = budget.get(triton.__version__)
    found: dict[str, Numbers] = {}
    failures = []
    todo = [(case, arch) for case in cases() if asked.only in case.name for arch in SHARED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler is outside of Python most of the time
        for (case, arch), numbers in zip(todo, pool.map(lambda one: measure(*one), todo), strict=True):
            name = f"{case.name} sm_{arch}"
            found[name] = numbers
            print(f"{name:60}" + " ".join(f"{k} {v}" for k, v in numbers.items()), flush=True)
            failures += [f"{name}: {says}" for says in broken_laws(case, arch, numbers)]
            if expected is not None and not asked.update:
                failures += [f"{name}: {says}" for says in compare(expected.get(name), numbers)]
    if asked.update:
        kept = (expected or {}) if asked.only else {}
        head = "# Written by `python -m benchmarks.aot --update`: a table per Triton version.\n"
        BUDGET.write_text(head + toml.dumps({**budget, triton.__version__: {**kept, **found}}))
    elif expected is None:
        print(f"kernel_budget.toml has no table for Triton {triton.__version__}: only the laws were checked")
    elif not asked.only:
        gone = expected.keys() - found
        failures += [f"{name}: is in kernel_budget.toml and nowhere else: run --update" for name in sorted(gone)]
    print("\n".join(failures), file=sys.stderr)
    return 3 if failures else 0


def cases() -> Iterator[AotCase]:
    """Every case of every kernel file."""
    for module in MODULES:
        yield from importlib.import_module(f"fastlth_kernels.{module}").aot_cases()


def measure(case: AotCase, arch: int) -> Numbers:
    """Compile for sm_<arch> and read the machine code."""
    compiled = _compile(case, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", str(cubin))
    return {**read_usage(usage), "shared": int(compiled.metadata.shared), **read_sass(sass, arch)}


def _compile(case: AotCase, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _tool(name: str, *arguments: str) -> str:
    from triton import knobs

    tool = getattr(knobs.nvidia, name).path  # the wheel of Triton carries them
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def read_usage(text: str) -> Numbers:
    """Of ``cuobjdump -res-usage``: registers and stack (bytes)."""
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"]}


def read_sass(text: str, arch: int) -> Numbers:
    """Of ``nvdisasm -c``: how many instructions of the kinds that matter."""
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    tensor = "HGMMA" if arch >= 90 else "HMMA"
    return {
        "spills": sum(op.split(".")[0] in ("LDL", "STL") for op in opcodes),
        "loads_128": sum(op.startswith("LDG") and ".128" in op for op in opcodes),
        "stores_128": sum(op.startswith("STG") and ".128" in op for op in opcodes),
        "tensor_core": sum(op.split(".")[0] == tensor for op in opcodes),
        "tf32": sum(".TF32" in op for op in opcodes),
        "instructions": sum(op != "NOP" for op in opcodes),
    }


def broken_laws(case: AotCase, arch: int, numbers: Mapping[str, int]) -> Iterator[str]:
    """What no kernel may do, whatever the file says."""
    if numbers["stack"] or numbers["spills"]:
        yield f"spills to memory: stack {numbers['stack']} bytes, {numbers['spills']} loads and stores"
    if numbers["shared"] > SHARED[arch]:
        yield f"shared memory {numbers['shared']} bytes; a block of sm_{arch} has {SHARED[arch]}"
    if case.tensor_cores and not numbers["tensor_core"]:
        yield "uses no tensor cores"
    if case.ieee and numbers["tf32"]:
        yield f"{numbers['tf32']} TF32 instructions in an fp32 kernel"


def compare(expected: Mapping[str, int] | None, found: Mapping[str, int]) -> Iterator[str]:
    """How the numbers differ from the file's."""
    if expected is None:
        yield "is not in kernel_budget.toml: run --update"
        return
    for name in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER):
        want, have = expected[name], found[name]
        if abs(have - want) <= SLACK.get(name, 0.0) * want:
            continue
        worse = have > want if name in LOWER_IS_BETTER else have < want
        yield f"{name} {have}, budget {want}: " + ("worse" if worse else "better, keep it with --update")


if __name__ == "__main__":
    sys.exit(main())
