"""The shell script of a dry run. It needs the SDK, bash, awk, sed and coreutils; none of ours."""

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
# ids of `qaic-util -q`: with several, each part also runs on all of them side by side. ITERATIONS
# (default {iterations}) are inferences of a part. manifest.json lists the files that this leaves.
# Send back logs/ and manifest.json: docs/cloud-ai-100.md says how.
set -euo pipefail
cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")"

sdk=${{{variable}:-{root}}}
read -r -a devices <<< "${{DEVICES:-0}}"
iterations=${{ITERATIONS:-{iterations}}}
cores={cores} # of the largest program
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
    2>/dev/null | head -n 1 || true)
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

check_graph() {{ # name
  local file
  for file in "onnx/$1/model.onnx"{buffers}; do
    [ -f "$file" ] || fail "$file is missing" {missing}
  done
}}

device_says() {{ # device, field
  awk -v id="$1" -v name="$2:" '
    $1 == "QID" {{ ours = $2 == id }}
    ours && index($0, name) {{ sub(/^[^:]*:[ \\t]*/, ""); sub(/[ \\t]+$/, ""); print; exit }}
  ' logs/qaic-util.txt
}}

check_devices() {{
  local device status free
  [ -x "$sdk/exec/qaic-runner" ] || fail "there is no exec/qaic-runner below $sdk" \\
    "it comes with the Platform SDK" "install it where the card is"
  [ -x "$sdk/tools/qaic-util" ] || fail "there is no tools/qaic-util below $sdk" \\
    "it comes with the Platform SDK" "install it where the card is"
  "$sdk/tools/qaic-util" -q > logs/qaic-util.txt 2>&1 || fail "qaic-util -q failed" \\
    "$(tail -n 3 logs/qaic-util.txt)" "sudo usermod -aG {group} \\$USER, then log in again"
  for device in "${{devices[@]}}"; do
    status=$(device_says "$device" Status)
    [ "$status" = Ready ] || fail "device $device is not ready: ${{status:-it is not there}}" \\
      "logs/qaic-util.txt has what there is" "set DEVICES to ids that are Ready"
    free=$(device_says "$device" 'Nsp Free')
    if [[ $free =~ ^[0-9]+$ ]] && [ "$free" -lt "$cores" ]; then
      fail "device $device has too few free cores" \\
        "the programs need $cores, $free of $(device_says "$device" 'Nsp Total') are free" \\
        "end what holds the others, set DEVICES, or make the dry run again with qaic:cores=$free"
    fi
  done
  grep -E 'QID|Status:|Nsp (Total|Free):|Sku Type:' logs/qaic-util.txt
}}

check_qpc() {{ # name
  local start
  start=$(od -A n -t x1 -N 5 "qpc/$1/{qpc}" 2>/dev/null | tr -d ' ') || true
  [ "${{start:0:8}}" = {magic} ] || fail "qpc/$1/{qpc} is not a QPC" \\
    "it starts with ${{start:-nothing}}" "delete qpc/$1 and compile again" 4
  [ "${{start:8}}" = {major} ] || fail "qpc/$1/{qpc} is a QPC of another version" \\
    "its format is 0x${{start:8}}, the runtime reads 0x{major}" \\
    "compile it with the Apps SDK of the same version as the Platform SDK" 4
}}

made_from() {{ # name, arguments: whatever a program depends on
  local name=$1
  shift
  printf '%s\\n' "SDK ${{version:-version unknown}}" "${{compiler[@]:1}}" "$@"
  sha256sum < "${{compiler[0]}}"
  sha256sum -- "onnx/$name"/*{hashed}
}}

compile_part() {{ # name, arguments
  local name=$1 code=0
  shift
  check_graph "$name"
  made_from "$name" "$@" > "logs/made-from-$name.txt"
  if [ -f "qpc/$name/{qpc}" ]; then
    check_qpc "$name"
    if cmp -s "logs/made-from-$name.txt" "qpc/$name.made-from"; then
      echo "$name: there already"
      return
    fi
    echo "$name: there, but made from another graph, other arguments or by another compiler"
  fi
  rm -rf -- "qpc/$name" "qpc/$name.made-from"
  echo "$name: compiling"
  "${{compiler[@]}}" "$@" ${{ending[@]+"${{ending[@]}}"}} "-aic-binary-dir=qpc/$name" \\
    > "logs/compile-$name.log" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    tail -n 30 "logs/compile-$name.log" >&2
    fail "compiling $name failed with exit code $code" "the lines above" \\
      "all of it is in logs/compile-$name.log" 4
  fi
  check_qpc "$name"
  cp -- "logs/made-from-$name.txt" "qpc/$name.made-from"
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
  local name device pid failed=0
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
      wait "$pid" || failed=4
    done
    [ "$failed" -eq 0 ] || exit "$failed"
  done
}

case ${1:-all} in
  check)
    check_compiler
    for name in "${names[@]}"; do check_graph "$name"; done
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
    missing: tuple[str, str],
    iterations: int,
) -> str:
    """The whole script. Paths are relative to its folder.

    Args:
        programs: name and spec of each.
        missing: why a graph may be missing, and what to do then.
    """
    new, old = DIALECTS["qaic-compile"], DIALECTS["qaic-exec"]
    common = {"variable": ROOT_VARIABLE, "root": DEFAULT_ROOT}
    cores = max(spec.cores for _, spec in programs)
    head = HEAD.format(name=name, card=card, iterations=iterations, cores=cores, **common)
    listed = any(spec.io_list for _, spec in programs)
    checks = CHECKS.format(
        new_program=new.program,
        new_target=shlex.join(new.target),
        new_ending=shlex.join(new.ending),
        old_program=old.program,
        old_target=shlex.join(old.target),
        old_ending=shlex.join(old.ending),
        missing=shlex.join(missing),
        buffers=' "buffers/$1.yaml"' if listed else "",
        hashed=' "buffers/$name.yaml"' if listed else "",
        group=GROUP,
        qpc=qpc.FILE,
        magic=qpc.MAGIC.to_bytes(4, "little").hex(),
        major=f"{qpc.MAJOR:02x}",
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
