#!/usr/bin/env bash
# What launch_tpu.sh does on every worker of a slice, in ~/mae_jax: src is the commit and venv what it needs. Of the run
# there are its log, its id, its code, the group of its processes, and alive, a lock that is held as long as one of them
# lives. gcloud repeats a command whose connection broke, so each may be called again while its first call goes on.
set -euo pipefail

# Ubuntu 22.04 has Python 3.10. uv brings the one that all tests were run with, without root and the locks of apt. pip
# checks uv's hash, uv that of Python.
readonly PYTHON=3.11 UV=0.13.9
readonly UV_HASHES=(d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19   # x86-64
                    5435c5ce14a56431208ca0996416d310f1598e8c2c8ba707688985a16bb82dbe)  # Arm

alive() { ! flock --nonblock alive true; }

install() { # COMMIT ITS_DATE
  local uv=uv-$UV/bin/uv
  exec 9>lock && flock 9
  stop
  rm -rf src && mv new src
  [[ -x $uv ]] || python3 -m pip install --quiet --disable-pip-version-check --upgrade --target="uv-$UV" \
    --require-hashes --requirement=<(echo "uv==$UV" "${UV_HASHES[@]/#/--hash=sha256:}")
  "$uv" venv --quiet --allow-existing --python="$PYTHON" venv
  # The date gives all workers, after every preemption too, the same packages.
  "$uv" pip install --quiet --python=venv --exclude-newer="$2" --editable="./src[tpu,gcs]"
  echo "$1" >commit
}

start() { # ID ARGUMENT...
  exec 9>lock && flock 9
  [[ $1 != "$(cat id 2>/dev/null)" ]] || return 0  # its first call did it
  [[ $(cat commit 2>/dev/null) == "${1%%-*}"* ]] || {
    echo "error: commit ${1%%-*} is not installed here; install it first" >&2
    exit 2
  }
  stop
  rm -f code && echo "$1" >id
  exec 8>alive && flock 8  # what is started inherits the lock
  setsid bash src/scripts/launch_tpu_worker.sh train "${@:2}" </dev/null >log 2>&1 9>&- &
  echo "$!" >group
}

train() { # ARGUMENT...
  local code=0
  trap : TERM  # it is for Python, which saves the state and ends
  cd src
  PYTHONUNBUFFERED=1 ../venv/bin/python -m mae_jax.main "$@" || code=$?
  echo "$code" >../code
}

stop() { # a run that lives saves its state; after two minutes it is killed
  alive || return 0
  kill -TERM -- "-$(<group)" || true
  flock --wait 120 alive true || kill -KILL -- "-$(<group)"
  flock alive true
}

follow() {
  local -a more=()
  alive && more=(--follow --sleep-interval=0.2 --pid="$(<group)")
  tail --lines=100 "${more[@]}" log | sed --unbuffered "s/^/[${HOSTNAME##*-w-}] /"
}

report() {
  local state=none
  if alive; then state=running; elif [[ -s code ]]; then state=$(<code); elif [[ -e id ]]; then state=killed; fi
  echo "mae_jax $state $(cat id 2>/dev/null) on $HOSTNAME"
}

main() { # COMMAND ARGUMENT...
  cd ~/mae_jax
  case $1 in
    install) install "${@:2}" ;;
    start) start "${@:2}" ;;
    train) train "${@:2}" ;;
    stop) stop ;;
    follow) follow ;;
    report) report ;;
    *) echo "error: unknown command $1" >&2 && exit 2 ;;
  esac
}

main "$@"
