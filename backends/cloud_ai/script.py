"""The shell script of a dry run. It needs bash, coreutils and the SDK, and nothing of ours."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from backends.cloud_ai import qpc
from backends.cloud_ai.probe import DEFAULT_ROOT, GROUP, ROOT_VARIABLE
from backends.cloud_ai.spec import DIALECTS, CompileSpec

HEAD = """\
#!/usr/bin/env bash
# {name} on Cloud AI 100 ({card}): compile each part, then time it. Not yet run on a card.
#
#   ./cloud-ai-100.sh check     what is here and what is missing
#   ./cloud-ai-100.sh compile   needs the Apps SDK, and no card
#   ./cloud-ai-100.sh run       needs the Platform SDK and a card
#   ./cloud-ai-100.sh           all three
#
# {variable} (default {root}) is the SDK. DEVICES (default 0; "0 1 2 3" for an Ultra) are
# ids of `qaic-util -q`: with several, each part also runs on all of them side by side.
# Send back logs/ and manifest.json: docs/cloud-ai-100.md says how.
set -euo pipefail
cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")"

sdk=${{{variable}:-{root}}}
read -r -a devices <<< "${{DEVICES:-0}}"
iterations=${{ITERATIONS:-{iterations}}}
mkdir -p qpc logs

fail() {{ # what, why, next
  printf 'error: %s\\n  why:  %s\\n  next: %s\\n' "$1" "$2" "$3" >&2
  exit "${{4:-2}}"
}}

"""
CHECKS = """\
check_compiler() {{
  if [ -x "$sdk/{new_program}" ]; then
    compiler=("$sdk/{new_program}" {new_target})
    ending=({new_ending})
  elif [ -x "$sdk/{old_program}" ]; then
    compiler=("$sdk/{old_program}" {old_target})
    ending=({old_ending})
  else
    fail "there is no compiler" "neither {new_program} nor {old_program} is below $sdk" \\
      "install Qualcomm's Apps SDK, or set {variable}"
  fi
  # Where both are there, the SDK's version decides.
  version=$(sed -n 's/.*<base_version>\\(.*\\)<\\/base_version>.*/\\1/p' "$sdk/versions/apps.xml" \\
    2>/dev/null || true)
  case $version in
    1.[0-9] | 1.1[0-9] | 1.2[01] | 1.[0-9].* | 1.1[0-9].* | 1.2[01].*)
      if [ -x "$sdk/{old_program}" ]; then
        compiler=("$sdk/{old_program}" {old_target})
        ending=({old_ending})
      fi
      ;;
  esac
  echo "compiler: ${{compiler[*]}} (SDK ${{version:-version unknown}})"
}}

check_graph() {{ # file
  [ -f "$1" ] || fail "$1 is missing" "this dry run was made without a bundle" \\
    {export}
}}

check_devices() {{
  [ -x "$sdk/exec/qaic-runner" ] || fail "there is no exec/qaic-runner below $sdk" \\
    "it comes with the Platform SDK" "install it where the card is"
  [ -x "$sdk/tools/qaic-util" ] || fail "there is no tools/qaic-util below $sdk" \\
    "it comes with the Platform SDK" "install it where the card is"
  "$sdk/tools/qaic-util" -q > logs/qaic-util.txt 2>&1 || fail "qaic-util -q failed" \\
    "$(tail -n 3 logs/qaic-util.txt)" "sudo usermod -aG {group} \\$USER, then log in again"
  for device in "${{devices[@]}}"; do
    grep -A1 -E "^QID $device( |\\$)" logs/qaic-util.txt | grep -q 'Status: *Ready' ||
      fail "device $device is not ready" "logs/qaic-util.txt has what there is" \\
        "set DEVICES to ids that are Ready"
  done
  grep -E 'QID|Status:|Nsp (Total|Free):|Sku Type:' logs/qaic-util.txt
}}

check_qpc() {{ # name
  local magic
  magic=$(od -A n -t x4 -N 4 --endian=little "qpc/$1/{qpc}" 2>/dev/null | tr -d ' ') || true
  [ "$magic" = {magic} ] || fail "qpc/$1/{qpc} is not a QPC" "it starts with ${{magic:-nothing}}" \\
    "delete qpc/$1 and compile again" 4
}}

compile_part() {{ # name, arguments
  local name=$1 code=0
  shift
  check_graph "onnx/$name/model.onnx"
  if [ -f "qpc/$name/{qpc}" ]; then
    check_qpc "$name"
    echo "$name: there already"
    return
  fi
  rm -rf -- "qpc/$name"
  echo "$name: compiling"
  "${{compiler[@]}}" "$@" ${{ending[@]+"${{ending[@]}}"}} "-aic-binary-dir=qpc/$name" \\
    > "logs/compile-$name.log" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    tail -n 30 "logs/compile-$name.log" >&2
    fail "compiling $name failed with exit code $code" "the lines above" \\
      "all of it is in logs/compile-$name.log" 4
  fi
  check_qpc "$name"
}}

run_part() {{ # name, device, label
  "$sdk/exec/qaic-runner" -t "qpc/$1" -a 1 -S 1 -n "$iterations" -d "$2" \\
    > "logs/run-$1-$3.log" 2>&1 || {{
    tail -n 10 "logs/run-$1-$3.log" >&2
    fail "running $1 on device $2 failed" "the lines above" "logs/run-$1-$3.log has all of it" 4
  }}
  echo "$1 on device $2: $(grep -o 'InferenceCnt.*' "logs/run-$1-$3.log" || echo 'no figure')"
}}

"""
TAIL = """\
run_all() {
  local name device pid
  for name in "${names[@]}"; do
    check_qpc "$name"
    run_part "$name" "${devices[0]}" "device${devices[0]}"
    [ "${#devices[@]}" -gt 1 ] || continue
    local pids=()
    for device in "${devices[@]}"; do
      run_part "$name" "$device" "beside-device$device" &
      pids+=("$!")
    done
    for pid in "${pids[@]}"; do
      wait "$pid"
    done
  done
}

case ${1:-all} in
  check)
    check_compiler
    for name in "${names[@]}"; do check_graph "onnx/$name/model.onnx"; done
    check_devices
    ;;
  compile)
    check_compiler
    compile_all
    ;;
  run)
    check_devices
    run_all
    ;;
  all)
    check_compiler
    compile_all
    check_devices
    run_all
    ;;
  *) fail "there is no step called $1" "it is check, compile, run or all" "$0 check" ;;
esac
"""


def script(
    name: str,
    card: str,
    programs: Sequence[tuple[str, CompileSpec]],
    export: str,
    iterations: int,
) -> str:
    """The whole script. Paths are relative to its folder.

    Args:
        programs: name and spec of each.
        export: the command that makes the bundle, for the message that a graph is missing.
    """
    new, old = DIALECTS["qaic-compile"], DIALECTS["qaic-exec"]
    common = {"variable": ROOT_VARIABLE, "root": DEFAULT_ROOT}
    head = HEAD.format(name=name, card=card, iterations=iterations, **common)
    checks = CHECKS.format(
        new_program=new.program,
        new_target=shlex.join(new.target),
        new_ending=shlex.join(new.ending),
        old_program=old.program,
        old_target=shlex.join(old.target),
        old_ending=shlex.join(old.ending),
        export=shlex.quote(f"{export}, then the dry run again"),
        group=GROUP,
        qpc=qpc.FILE,
        magic=f"{qpc.MAGIC:08x}",
        **common,
    )
    names = f"names=({' '.join(shlex.quote(each) for each, _ in programs)})\n\n"
    calls = []
    for each, spec in programs:
        fixed = {*new.target, *new.ending, f"-aic-binary-dir={spec.binary_dir}"}
        words = [word for word in spec.arguments(new) if word not in fixed]
        calls.append(f"  compile_part {shlex.quote(each)} {shlex.join(words)}")
    body = "compile_all() {\n" + "\n".join(calls) + "\n}\n\n"
    return head + checks + names + body + TAIL
