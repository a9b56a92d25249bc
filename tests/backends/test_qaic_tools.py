"""Cloud AI 100 without a card: what is found, what is asked of the compiler, what it says."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backends.base import PreconditionError, UnsupportedError
from backends.cloud_ai import figures, probe, qpc
from backends.cloud_ai.compiler import FlagError, failure, unknown_flag
from backends.cloud_ai.options import parse_devices
from backends.cloud_ai.presets import BATCHES, CORES, preset, preset_for
from backends.cloud_ai.spec import DIALECTS, CompileSpec
from backends.qaic import QaicBackend
from backends.registry import parse_backend
from core.files import ROOT
from export.models import PARTS
from tests.doubles.cloud_ai_sdk_standin import NEW, OLD, ULTRA, make_sdk, set_state

GOLDEN = ROOT / "tests" / "golden" / "qaic_arguments.json"


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without SDK, card or device nodes, wherever this runs."""
    monkeypatch.setenv(probe.ROOT_VARIABLE, str(tmp_path / "sdk"))
    monkeypatch.setattr(probe, "runtimes", lambda root: ("qaic",))
    return tmp_path


def pci_device(folder: Path, vendor: str = "0x17cb", device: str = "0xa100") -> Path:
    one = folder / "0000:2d:00.0"
    one.mkdir(parents=True)
    (one / "vendor").write_text(f"{vendor}\n")
    (one / "device").write_text(f"{device}\n")
    return folder


def look(home: Path, dialect: str = "auto") -> probe.Findings:
    return probe.look(dialect, nodes=home / "accel", pci=home / "pci")


# --- probe

QUERY = """LRT QC_IMAGE_VERSION: LRT.AIC
Number of devices: 3
QID 0
\tStatus:Ready
\tPCI Address:0000:2d:00.0
\tNsp Total:16
\tNsp Free:9
\tBoard serial:XYZ
\tBoard power(Watts):41.5
\tTDP Cap(Watts):150.0
\tSku Type:PCIe Ultra
QID 12
\tStatus:Error
\tPCI Address:0000:2e:00.0
QID 13
\tStatus:Ready
\tNsp Total:many
"""


def test_the_query_is_read_line_by_line_and_what_is_not_said_is_unknown() -> None:
    full, error, odd = probe.parse_util(QUERY)
    assert (full.id, full.status, full.cores_total, full.cores_free) == (0, "Ready", 16, 9)
    assert (full.sku, full.board, full.power_w, full.tdp_w) == ("PCIe Ultra", "XYZ", 41.5, 150.0)
    assert (error.id, error.status, error.cores_total, error.sku) == (12, "Error", None, "")
    assert (odd.id, odd.cores_total, odd.power_w) == (13, None, None)
    assert probe.parse_util("no devices found") == ()
    newer = QUERY.replace("TDP Cap", "Board TDP Cap") + "\tSOC TDP Cap(Watts):31.00\n"
    assert probe.parse_util(newer)[0].tdp_w == 150.0, "newer SDKs name the board's and the SoC's"


@pytest.mark.parametrize(
    ("sku", "cores", "card"),
    [
        ("PCIe Ultra", 16, "ultra"),
        ("Pcie Ultra", 16, "ultra"),
        ("PCIe Pro", 16, "pro"),
        ("PCIe", 14, "standard"),
        ("M.2", 14, "standard"),
        ("M.2", 16, "ultra"),
    ],
)
def test_presets_go_by_the_sku_however_it_is_spelt(
    sku: str, cores: int, card: str, nothing: Path
) -> None:
    state = {"cards": [{"id": 0, **ULTRA, "sku": sku, "total": cores, "free": cores}]}
    make_sdk(nothing / "sdk", state=state)
    assert QaicBackend().card == card


@pytest.mark.parametrize(
    ("version", "program"), [(OLD, "qaic-exec"), (NEW, "qaic-compile"), ("1.9.80", "qaic-exec")]
)
def test_the_sdk_says_its_version_and_so_the_dialect(
    version: str, program: str, tmp_path: Path
) -> None:
    sdk = probe.find_sdk(make_sdk(tmp_path / "sdk", version))
    assert sdk.version == version
    assert sdk.dialect is not None
    assert sdk.dialect.name == program
    assert sdk.compiler == tmp_path / "sdk" / "exec" / program


def test_without_a_version_the_program_decides_and_with_both_the_version(tmp_path: Path) -> None:
    root = make_sdk(tmp_path / "sdk", OLD)
    (root / "exec" / "qaic-compile").symlink_to("qaic-exec")
    assert probe.find_sdk(root).dialect == DIALECTS["qaic-exec"]
    (root / "versions" / "apps.xml").unlink()
    unknown = probe.find_sdk(root)
    assert unknown.version == ""
    assert unknown.dialect == DIALECTS["qaic-compile"]
    assert probe.find_sdk(root, "qaic-exec").dialect == DIALECTS["qaic-exec"]


def test_each_thing_that_is_missing_is_named_with_what_to_do(nothing: Path) -> None:
    found = probe.capability(look(nothing), (0,))
    assert not found.usable
    assert "no Cloud AI SDK" in found.what
    assert "QAIC_SDK_ROOT" in found.next
    assert "--dry-run" in found.next
    assert "--device ai100-ultra" in found.next

    root = make_sdk(nothing / "sdk", runtime=False)
    found = probe.capability(look(nothing), (0,))
    assert not found.usable
    assert "compiler only" in found.what
    assert found.version == OLD
    assert probe.compiler_capability(look(nothing)).usable

    pci_device(nothing / "pci")
    (nothing / "accel").mkdir()
    node = nothing / "accel" / "accel0"
    node.touch()
    found = probe.capability(look(nothing), (0,))
    assert "does not answer" in found.what
    assert "tools/qaic-util" in found.why
    assert len(look(nothing).pci) == 1
    assert root.is_dir()


def test_no_permission_names_the_group(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sdk(nothing / "sdk", state={"util_fails": True})
    pci_device(nothing / "pci", device="0xa080")
    (nothing / "accel").mkdir()
    (nothing / "accel" / "accel0").touch()
    monkeypatch.setattr(probe.os, "access", lambda path, mode: "accel0" not in str(path))
    found = probe.capability(look(nothing), (0,))
    assert "no permission" in found.what
    assert "group qaic" in found.why
    assert "usermod -aG qaic" in found.next


def test_a_node_without_a_card_on_the_bus_says_nothing(nothing: Path) -> None:
    pci_device(nothing / "pci", vendor="0x8086")
    (nothing / "accel").mkdir()
    (nothing / "accel" / "accel0").touch(mode=0)
    assert look(nothing).closed == ()
    assert look(nothing).pci == ()


def test_a_host_with_everything_is_usable_until_a_device_is_not(nothing: Path) -> None:
    root = make_sdk(nothing / "sdk", NEW)
    found = probe.capability(look(nothing), (0, 1, 2, 3))
    assert found.usable, found
    assert found.devices == ("0", "1", "2", "3")
    assert "PCIe Ultra" in found.what
    assert "7 is not there" in probe.capability(look(nothing), (7,)).what
    set_state(root, {"cards": [{"id": 0, **ULTRA, "status": "Initializing"}]})
    assert "0 is Initializing" in probe.capability(look(nothing), (0,)).what


def test_no_runtime_is_the_last_thing_asked_for(
    nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sdk(nothing / "sdk")
    monkeypatch.setattr(probe, "runtimes", lambda root: ())
    found = probe.capability(look(nothing), (0,))
    assert "no Python runtime" in found.what
    assert ".whl" in found.next


def test_the_backend_imports_no_sdk_and_asks_nothing_until_it_is_asked() -> None:
    code = (
        "import subprocess, sys; subprocess.run = subprocess.Popen = None\n"
        "from backends.registry import parse_backend; parse_backend('qaic:device=0-3')\n"
        "sys.exit(bool({'qaic', 'qaicrt', 'onnx', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- devices and other options


def test_ids_are_read() -> None:
    assert parse_devices("0") == (0,)
    assert parse_devices("0-3") == (0, 1, 2, 3)
    assert parse_devices("2+4-5") == (2, 4, 5)


def test_a_name_that_no_card_has_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(PreconditionError) as error:
        parse_backend("qaic:device=ai100-ultra2")
    assert "ai100-standard, ai100-pro, ai100-ultra" in error.value.why


def test_a_modelled_cards_name_is_no_id() -> None:
    with pytest.raises(PreconditionError, match="name of a modelled card"):
        QaicBackend({"device": "ai100-ultra"})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("device=first", "no list of devices"),
        ("device=3-1", "names no device"),
        ("device=0+0", "twice"),
        ("cores=0", "at least 1"),
        ("block=some", "not a number"),
        ("split=any", "not a value"),
    ],
)
def test_bad_options_are_refused(option: str, message: str) -> None:
    with pytest.raises(PreconditionError) as error:
        parse_backend(f"qaic:{option}")
    assert message in str(error.value)


# --- arguments


def spec_of(card: str, part: str, batch: int) -> CompileSpec:
    chosen = preset(card, part, batch)
    return CompileSpec(
        Path("model.onnx"), Path("qpc"), chosen.cores, batch, (("batch", batch),), chosen.mos,
        chosen.ols, chosen.depth_first_mem, io_list=Path("buffers.yaml"),
    )  # fmt: skip


def all_arguments() -> dict[str, Any]:
    return {
        f"{card} {part} batch {batch}": {
            "follows": preset(card, part, batch).follows,
            "note": preset(card, part, batch).note,
            "block": preset(card, part, batch).block,
            **{one.name: spec_of(card, part, batch).arguments(one) for one in DIALECTS.values()},
        }
        for card in CORES
        for part in PARTS
        for batch in BATCHES
    }


def test_arguments_are_those_of_the_golden_file() -> None:
    """After a wanted change: `python -m tests.backends.test_qaic_tools`; read the difference."""
    assert all_arguments() == json.loads(GOLDEN.read_text())


def test_the_ultras_unet_is_compiled_as_the_public_recipe_has_it() -> None:
    """The words of quic/cloud-ai-sdk's sdxl_turbo, but for the symbols of its own graphs."""
    chosen = preset("ultra", "unet", 1)
    spec = CompileSpec(
        Path("unet.onnx"), Path("qpc"), chosen.cores, 1, (("batch", 1),), chosen.mos, chosen.ols
    )
    assert chosen.follows == "public recipe"
    assert set(spec.arguments(DIALECTS["qaic-exec"])) == {
        "-aic-hw", "-aic-hw-version=2.0", "-aic-perf-warnings", "-aic-perf-metrics",
        "-convert-to-fp16", "-onnx-define-symbol=batch,1", "-stats-batchsize=1",
        "-aic-num-cores=16", "-compile-only", "-m=unet.onnx", "-mos=2", "-ols=1",
        "-aic-binary-dir=qpc",
    }  # fmt: skip
    assert preset_for(chosen, "sdxl-turbo", (512, 512)) == chosen
    for model, side in (("sdxl-turbo", 1024), ("sd-turbo", 512)):
        other = preset_for(chosen, model, (side, side))
        assert other.follows == "derived"
        assert "SDXL-Turbo at 512 px" in other.note
        assert other.block == chosen.block
    assert preset("standard", "unet", 1).follows == "derived"
    for part in ("taesd_decoder", "vae_encoder", "taesd_encoder"):
        assert preset("ultra", part, 1).follows == "derived"


def test_every_flag_of_a_spec_has_its_place() -> None:
    spec = CompileSpec(
        Path("m"), Path("q"), 2, 4, multicast_weights=True, mxfp6_matmul=True, perf=False,
        convert_to_fp16=False, node_precision=Path("n.yaml"), partition=Path("p.json"),
    )  # fmt: skip
    assert spec.command(DIALECTS["qaic-compile"], Path("/sdk")) == [
        "/sdk/exec/qaic-compile", "-aic-hw", "-aic-hw-version=ai100", "-m=m",
        "-stats-batchsize=4", "-aic-num-cores=2", "-multicast-weights", "-mxfp6-matmul",
        "-node-precision-info=n.yaml", "-mdp-load-partition-config=p.json", "-aic-binary-dir=q",
    ]  # fmt: skip


@pytest.mark.parametrize(("batch", "nearest"), [(3, "2"), (8, "4")])
def test_a_batch_without_preset_names_the_nearest(batch: int, nearest: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        preset("ultra", "unet", batch)
    assert f"--batch {nearest}" in error.value.next


# --- what the compiler and the runner say

METRICS = """AIC WARNING: MAC estimate does not yet handle all operations
Original MAC estimate: 18446744060020916224
AIC HMX MAC estimate:  1234567
AIC non-HMX MAC estimate:  0
preD32 constants size: 342228040 B
final constants size: 215076032 B
Constants size: 215076864 (bytes)
 port02: DDR traffic  read:        864 KB
    c00: DDR traffic  read:      83957 KB (first-inf      83957 KB)
             constant only:      83957 KB (first-inf      83957 KB)
    c01: DDR traffic  read:      84 MB
    c01: DDR traffic write:        864 KB
    c01: MC  traffic write:      83352 KB
  total: DDR traffic  read:     168941 KB (first-inf     168941 KB)
"""


def test_metrics_become_compiler_estimates() -> None:
    assert figures.parse_metrics(METRICS) == {
        "provenance": "compiler-estimate",
        "macs": 1234567,
        "constants_mb": 215.076864,
        "ddr_read_mb": {"c00": 83.957, "c01": 84.0, "total": 168.941},
        "ddr_write_mb": {"c01": 0.864},
    }


def test_what_is_not_printed_or_cannot_be_is_unknown() -> None:
    nothing = figures.parse_metrics("Compile started ....\n")
    assert nothing["macs"] is None
    assert nothing["constants_mb"] is None
    assert nothing["ddr_read_mb"] == {}
    wrapped = figures.parse_metrics("AIC HMX MAC estimate:  18446744060044509184\n")
    assert wrapped["macs"] is None


def test_the_runners_line_is_read() -> None:
    text = " ---- Stats ----\nInferenceCnt 40 TotalDuration 100000us BatchSize 8 Inf/Sec 3200.0\n"
    assert figures.parse_runner(text) == {
        "inferences": 40, "batch": 8, "ms_per_inference": 2.5, "samples_per_s": 3200.0,
    }  # fmt: skip
    assert figures.parse_runner("no device") is None


def test_an_unknown_flag_is_found_in_the_compilers_complaint() -> None:
    arguments = ["-aic-hw", "-aic-hw-version=2.0", "-mos=2", "-m=model.onnx"]
    old = DIALECTS["qaic-exec"]
    said = "qaic-exec: Unknown command line argument '-aic-hw-version=2.0'. Try --help"
    error = failure(1, said, "unet", arguments, old, OLD)
    assert isinstance(error, FlagError)
    assert "does not know -aic-hw-version" in error.what
    assert OLD in error.what
    assert said in error.why
    assert unknown_flag("-mos=2 is fine; invalid model", arguments) is None
    other = failure(3, "Segmentation fault", "unet", arguments, old, "")
    assert not isinstance(other, FlagError)
    assert "exit code 3" in other.what


# --- QPC


def header(magic: int = qpc.MAGIC, major: int = 0) -> bytes:
    return struct.pack("<IBBHQQ", magic, major, 1, 0, 99, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no programqpc.bin"),
        (header()[:7], "is cut"),
        (header(magic=0x7C00), "is not a QPC"),
        (header(major=7), "another version"),
    ],
)
def test_a_file_that_is_no_program_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / qpc.FILE).write_bytes(content)
    with pytest.raises(qpc.QpcError, match=message):
        qpc.read_header(tmp_path)


def test_a_programs_header_is_read(tmp_path: Path) -> None:
    (tmp_path / qpc.FILE).write_bytes(header() + b"...")
    assert (tmp_path / qpc.FILE).read_bytes()[:4] == bytes.fromhex("7ccda100")
    assert qpc.read_header(tmp_path) == qpc.QpcHeader(0, 1, 99)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(all_arguments(), indent=1) + "\n")
