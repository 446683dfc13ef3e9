#!/usr/bin/env bash
# setup.sh run|test|dev
# Installs what running, testing or developing needs and is missing: system packages with apt where that is there and
# permitted, and Python packages into .venv. Quick when there is nothing to do; starts .venv afresh after an interrupt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/stage.sh
purpose=$1
venv=.venv

fail() {
  echo "set-up: $*" >&2
  exit 1
}

# Prints the first Python of a supported version.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# Prints the Debian packages that are missing: a compiler, headers, and what of Python its package leaves out.
missing_packages() {
  local python
  if ! command -v g++ >/dev/null; then
    echo g++ nlohmann-json3-dev libcli11-dev libpcre2-dev libutf8proc-dev libssl-dev libgtest-dev
  else
    g++ -E -P -x c++ - <<'END'
#if !__has_include(<nlohmann/json.hpp>)
nlohmann-json3-dev
#endif
#if !__has_include(<CLI/CLI.hpp>)
libcli11-dev
#endif
#if !__has_include(<pcre2.h>)
libpcre2-dev
#endif
#if !__has_include(<utf8proc.h>)
libutf8proc-dev
#endif
#if !__has_include(<openssl/evp.h>)
libssl-dev
#endif
#if !__has_include(<gtest/gtest.h>)
libgtest-dev
#endif
END
  fi
  if python=$(find_python); then
    "$python" - <<'END'
import importlib.util, os, sys, sysconfig

name = f"python{sys.version_info.major}.{sys.version_info.minor}"
if importlib.util.find_spec("ensurepip") is None:
    print(f"{name}-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print(f"{name}-dev")
END
  else
    echo python3 python3-venv python3-dev
  fi
}

install_system_packages() {
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120)
  [ "$(id -u)" -eq 0 ] || apt=(sudo -n "${apt[@]}")
  # Twice: the package lists may be absent, or older than what the mirror has.
  "${apt[@]}" install -y --no-install-recommends "$@" ||
    { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "$@"; }
}

# Prints what pyproject.toml asks for: to build, to run, and for the purpose.
requirements() {
  "$venv/bin/python" - "$purpose" <<'END'
import sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
extras = project["project"]["optional-dependencies"]
print(*project["build-system"]["requires"], *project["project"]["dependencies"], *extras.get(sys.argv[1], ()), sep="\n")
END
}

install_python_packages() {
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --no-compile)
  touch "$venv/.incomplete"
  # Without a GPU, torch's CPU build where the user's package index has one: it is gigabytes smaller.
  if ! "$venv/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null && [ ! -e /dev/nvidiactl ]; then
    "${pip[@]}" 'torch==2.13.0+cpu' || true
  fi
  requirements >"$venv/requirements.txt"
  "${pip[@]}" -r "$venv/requirements.txt"
  rm "$venv/.incomplete"
}

# One set-up at a time, one that outlived its make included.
exec {lock}<tools/setup.sh
flock --nonblock $lock || { echo "set-up: another one is running, waiting for it" && flock $lock; }

read -r -d '' -a packages < <(missing_packages) || true
if [ ${#packages[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || fail "missing on this system, by Debian's names: ${packages[*]}"
  [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null || fail "missing system packages. Run: sudo apt-get install ${packages[*]}"
  stage "set-up: system packages ${packages[*]}" build/log/apt.txt install_system_packages "${packages[@]}"
fi
python=$(find_python) || fail "Python 3.11 or 3.12 is needed and not on PATH; name one: make PYTHON=/path/to/python3.12"

if [ -d "$venv" ] && { [ -e "$venv/.incomplete" ] || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; }; then
  echo "set-up: the last one was interrupted, starting $venv afresh"
  rm -rf "$venv"
fi
if [ ! -d "$venv" ]; then
  stage "set-up: $("$python" --version) environment in $venv" build/log/venv.txt "$python" -m venv "$venv"
fi
stage "set-up: Python packages to $purpose (the first time, minutes)" "build/log/pip-$purpose.txt" install_python_packages
touch "$venv/.run" "$venv/.$purpose"
