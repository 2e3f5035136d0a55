# Sourced by demo.sh and test.sh: makes .venv (or $LLMQ_VENV) on first use and puts it first on PATH.
# usage: . scripts/env.sh EXTRAS      e.g. `. scripts/env.sh '[test]'`
venv="${LLMQ_VENV:-.venv}"
stamp="$venv/.llmq-$(cat pyproject.toml scripts/constraints.txt | cksum | cut -d' ' -f1)-${1:-}"
if [ ! -e "$stamp" ]; then
    python=""
    for candidate in python3 python3.13 python3.12 python3.11; do  # run each: a version manager's shim can be on PATH and fail
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$candidate"; break; fi
    done
    [ -n "$python" ] || { echo "llmq needs Python 3.11 or newer; none of python3, python3.11-3.13 on PATH is one" >&2; exit 1; }
    echo "making the environment $venv ($("$python" --version))"
    "$python" -m venv "$venv" ||
        { echo "python3 -m venv failed; install your system's python3-venv package" >&2; exit 1; }
    "$venv/bin/pip" install --quiet --disable-pip-version-check --constraint scripts/constraints.txt torch
    "$venv/bin/pip" install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable ".${1:-}"
    touch "$stamp"
fi
PATH="$(cd "$venv" && pwd)/bin:$PATH"
