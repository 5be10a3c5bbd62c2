#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or several: creates it, installs this commit on all its workers, runs, and starts again
# until the run is done. `./launch_tpu.sh --help` shows an example. What the workers do is in scripts/launch_tpu_worker.sh.
set -euo pipefail

# A machine that was taken away closes no connection: without these, ssh would wait for it for ever.
readonly SSH_FLAGS=(--ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=30
                    --ssh-flag=-oServerAliveCountMax=4)

name="" zone="" type="" project="" version="" service_account="" retries=100 slices=1
spot="" queued="" keep="" dry_run="" train=()
pause=${LAUNCH_TPU_PAUSE:-30}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
types=$root/mae_jax/commands/plan/tpu_types.csv
commit="" archive="" run_id="" attempt="" started=0 states="" slice="" quiet=""

usage() {
  cat <<'END'
Trains on a Cloud TPU slice, and starts again until the run is done.

  ./launch_tpu.sh run --name=vit-l --zone=europe-west4-a --type=v3-128 --spot --queued \
      -- --config=configs/vit_l_mae.py --workdir=gs://my-bucket/vit_l --config.optim.lr=1e-4

What follows -- goes to `python -m mae_jax.main` on every worker, as it is. The commit that is checked out here is what
runs, with the packages that were current at its date. The slice is the launcher's own: what is on its disk is lost.

  run      create, install, start and logs, again after every preemption until the run is done; then delete
  create   create the slice and wait until it is ready
  install  copy this commit to all workers and install it; a run that lives there saves its state and ends
  start    start the run on all workers; it needs no connection to this machine
  logs     show the logs of all workers until the run ends
  status   say how the slice is, and the run on each worker
  stop     end the run with its state saved; stop watching first, since `run` would start it again
  delete   delete the slice, and the request in the queue

  --name=NAME, --zone=ZONE  of the slice, and of the request in the queue
  --type=TYPE               accelerator type, as v3-128, v5litepod-16 or v6e-8, or its topology, as v3:8x8
  --project=ID              else the one that gcloud is set to
  --version=VERSION         of the TPU's software, else the one for the type
  --spot                    cheaper, and taken away when others need it
  --queued                  wait in the queue until there is room
  --slices=N                so many slices of the type as one run, with --queued; every command needs it but delete
  --service-account=EMAIL   act as this account, which needs to read the data and write the workdir, and no more
  --retries=N               how often `run` tries again, 100
  --keep                    `run` leaves the slice at its end
  --dry-run                 print every command that would be run where nothing goes wrong, and run none

Several workers: `ssh-add ~/.ssh/google_compute_engine` first, since gcloud wants the key in the agent.
LAUNCH_TPU_PAUSE (30): seconds between two looks, and before the first new try; later ones wait longer, to 16 times.
Exit codes: 0 the run is finished, 2 your mistake, or no slice to be had, 3 stopped by a guard, 1 a bug in mae_jax,
75 out of retries: run it again, 130 you stopped watching: the slice goes on and costs money.
END
}

say() { echo "[launch] $*" >&2; }

fail() { # TEXT: a mistake of the user's ends with one line
  echo "error: $*" >&2
  exit 2
}

parse() { # OPTION... [-- ARGUMENT...]
  while (($#)); do
    case $1 in
      --name=*) name=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --version=*) version=${1#*=} ;;
      --service-account=*) service_account=${1#*=} ;;
      --retries=*) retries=${1#*=} ;;
      --slices=*) slices=${1#*=} ;;
      --spot) spot=yes ;;
      --queued) queued=yes ;;
      --keep) keep=yes ;;
      --dry-run) dry_run=yes ;;
      --help) usage && exit ;;
      --) train=("${@:2}") && return ;;
      *) fail "unknown option $1; options are written --name=VALUE, those of the run follow --, --help shows all" ;;
    esac
    shift
  done
}

check() { # OPTION...: these must be given
  local option
  for option; do
    [[ ${!option} ]] || fail "--$option=... must be given; --help shows an example"
  done
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name; expected small letters, digits and -, as vit-l-1"
  [[ "$retries $pause" =~ ^(0|[1-9][0-9]*)\ (0|[1-9][0-9]*)$ ]] ||
    fail "--retries=$retries, LAUNCH_TPU_PAUSE=$pause; expected whole numbers"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices; expected how many slices, 1 or more"
  [[ $dry_run ]] || command -v gcloud >/dev/null ||
    fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install, then gcloud auth login"
}

check_type() { # it must be one of the table, which says its software; another one needs --version
  local generations="" known="" one shape software
  while IFS=, read -r one shape software; do
    [[ $one != \#* ]] || continue
    [[ $shape != "$type" ]] || type=$one  # a topology, as `mae_jax plan` takes it
    if [[ $one == "$type" ]]; then
      [[ ${version:-$software} == "$software" ]] || say "--version=$version; JAX on $type is used with $software"
      version=${version:-$software}
      return
    fi
    [[ " $generations" == *" ${one%-*}-"* ]] || generations+="${one%-*}-N "
    [[ ${type%%-*} != "${one%-*}" && ${type%%-*} != "${shape%:*}" ]] || known+="$one "
  done <"$types"
  [[ $version ]] ||
    fail "--type=$type is not known; expected one of: ${known:-$generations}(another one needs --version=... too)"
}

check_commit() {
  local changed
  commit=$(git -C "$root" rev-parse --quiet --verify HEAD 2>/dev/null) ||
    fail "$root is not a git checkout; what runs on the workers is a commit"
  changed=$(git -C "$root" status --porcelain -- scripts/launch_tpu_worker.sh setup.py pyproject.toml configs mae_jax)
  [[ ! $changed ]] || fail "not committed, so it would not run: ${changed%%$'\n'*}; commit it or stash it"
}

check_run() {
  local argument before="" config="" mode=train workdir=""
  for argument in ${train[@]+"${train[@]}"}; do
    argument=$before$argument before=""
    case $argument in
      --config | --mode | --workdir) before=$argument= ;;  # its value is the next one
      --config=*) config=${argument#*=} ;;
      --mode=*) mode=${argument#*=} ;;
      --workdir=*) workdir=${argument#*=} ;;
    esac
  done
  [[ $workdir ]] || fail "--workdir=gs://BUCKET/FOLDER must be given, after --; --help shows an example"
  [[ $workdir =~ ^gs://[a-z0-9][a-z0-9_.-]+[a-z0-9](/|$) ]] ||
    fail "--workdir=$workdir would be lost with the slice, or names no bucket; expected gs://BUCKET/FOLDER"
  [[ $config || $mode != train ]] || fail "--config=FILE must be given, after --; --help shows an example"
  [[ ! $config ]] || git -C "$root" cat-file -e "$commit:${config%%:*}" 2>/dev/null ||
    fail "--config=$config is not in commit ${commit:0:12}; expected a committed file, as configs/vit_l_mae.py"
  # The same commit and arguments are the same run, also for another launcher that comes back to it.
  run_id=${commit:0:12}-$(printf '%s\0' "${train[@]}" | cksum | cut -d' ' -f1)
}

shown() { # COMMAND...: shows a command as it can be pasted, and runs it
  local text
  printf -v text ' %q' "$@"
  if [[ $dry_run ]]; then
    echo "${text:1}"
  else
    [[ $quiet ]] || echo "+$text" >&2
    "$@" </dev/null
  fi
}

cloud() { shown gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"} --quiet; }

everywhere() { # ssh|scp ARGUMENT...: on all workers; on one alone, JAX would wait for the others
  if ((slices > 1)); then
    cloud queued-resources "$@" --node=all --worker=all
  else
    cloud tpu-vm "$@" --worker=all
  fi
}

on_workers() { # WORD...
  local text
  printf -v text ' %q' "$@"
  everywhere ssh "$name" "${SSH_FLAGS[@]}" --command="bash mae_jax/src/scripts/launch_tpu_worker.sh$text"
}

list() { # tpu-vm|queued-resources: NAME,STATE of all in the zone
  local field=state
  [[ $1 == tpu-vm ]] || field=state.state
  cloud "$1" list --format="csv[no-heading](name.basename(),$field)"
}

state_of() { # tpu-vm|queued-resources: its state, nothing where there is none; fails where gcloud cannot say
  local rows nodes=1
  [[ $1 == queued-resources ]] || nodes=$slices
  rows=$(quiet=yes && list "$1") || return
  awk -F, -v name="$name" -v nodes="$nodes" '  # of several slices, the state of the one that is furthest from ready
    nodes == 1 ? $1 == name : $1 ~ "^" name "-[0-9]+$" {
      found++
      if ($2 ~ /^(PREEMPTED|TERMINATED|STOP|HID)/) lost = $2; else if ($2 != "READY") other = $2
    }
    END { if (found) print lost ? lost : other ? other : found < nodes ? "CREATING" : "READY" }' <<<"$rows"
}

create() {
  local -a more=("--accelerator-type=$type")
  [[ ! $spot ]] || more+=(--spot)
  [[ ! $service_account ]] || more+=("--service-account=$service_account")
  if [[ $queued ]]; then
    local -a nodes=("--node-id=$name")
    ((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$name")  # NAME-0, NAME-1 ...
    cloud queued-resources create "$name" "${nodes[@]}" --runtime-version="$version" "${more[@]}"
  else
    cloud tpu-vm create "$name" --version="$version" "${more[@]}"
  fi
}

delete_request() { cloud queued-resources delete "$name" --force; }  # and its slice

delete_slice() { cloud tpu-vm delete "$name"; }

pack() {
  archive=${TMPDIR:-/tmp}/mae_jax-$commit.tar.gz
  if [[ ! $dry_run ]]; then
    archive=$(mktemp -d)/mae_jax.tar.gz
    trap 'rm -rf "$(dirname "$archive")"' EXIT
  fi
  shown git -C "$root" archive --format=tar.gz --output="$archive" "$commit"
}

install() {
  local date
  date=$(git -C "$root" show -s --format=%cI "$commit")
  everywhere scp "$archive" "$name:mae_jax.tar.gz" &&
    everywhere ssh "$name" "${SSH_FLAGS[@]}" --command="mkdir -p mae_jax/new &&\
 tar -xzf mae_jax.tar.gz -C mae_jax/new && bash mae_jax/new/scripts/launch_tpu_worker.sh install $commit $date" &&
    slice=installed
}

start() {
  attempt=$run_id-$(date +%s)-$((++started))  # a run may end within the second in which it was started
  on_workers start "$attempt" "${train[@]}"
}

look() { # prints absent, ready, waiting or lost, and why; fails where that cannot be known
  local node request
  request=$(state_of queued-resources) && node=$(state_of tpu-vm) || return
  case $request/$node in
    /) echo "absent" ;;
    FAILED/* | SUSPEND*/*) echo "lost: the request is $request" ;;
    */READY) echo "ready" ;;
    */PREEMPTED | */TERMINATED | */STOP* | */HID*) echo "lost: it is $node" ;;
    */) echo "waiting: the request is $request" ;;
    *) echo "waiting: it is $node" ;;
  esac
}

bring_up() { # creates the slice where there is none and waits until it is ready; fails where it must be tried again
  local now before=""
  while :; do
    now=$(look) || { [[ $slice ]] && return 1; } || fail "gcloud cannot look into $zone; what is above says why"
    [[ $now == "$before" ]] || say "$name is $now"
    before=$now
    case $now in
      ready) slice=${slice:-found} && return ;;
      absent)
        [[ $slice != new ]] || sleep "$pause"  # created a moment ago, and not listed yet
        # Just after a preemption there is seldom room; at the beginning, the user must know.
        create || { [[ $slice ]] && return 1; } || fail "no slice; gcloud says why. With --queued it waits for room"
        slice=new ;;
      lost*) remove || say "$name could not be deleted"; return 1 ;;  # it does not come back by itself
      *) sleep "$pause" ;;
    esac
  done
}

report() { # prints 'STATE ID' of the workers' runs, each once
  local lines
  lines=$(on_workers report) || return
  awk '$1 == "mae_jax" { print $2, $3 }' <<<"$lines" | sort -u
}

attach() { # succeeds where all workers have the attempt that began here, or all run the same run already
  local found
  found=$(report) || return
  [[ $attempt || $found == *$'\n'* || $found != "running $run_id-"* ]] || attempt=${found#running }
  [[ $attempt && $found ]] && ! grep -qv " $attempt\$" <<<"$found"
}

watch() { # shows the logs until the runs have ended; `states` is then how. Fails where that is not known
  while :; do
    on_workers follow || true  # gcloud's code may be that of a connection; how a run ended is in a file
    states=$(report) || return
    states=$(cut -d' ' -f1 <<<"$states" | sort -u | paste -sd ' ' -)
    [[ " $states " == *' running '* ]] || return 0
    say "the connection broke, the run goes on"
    sleep "$pause"
  done
}

verdict() { # prints the exit code that those of the workers come to; 75 where to start again helps
  case " $states " in
    ' 0 ') echo 0 ;;
    *' 3 '*) echo 3 ;;
    *' 1 '*) echo 1 ;;
    ' 2 ') echo 2 ;;  # beside another code it only says that a peer did not come
    *) echo 75 ;;
  esac
}

remove() { # deletes what there is
  local node request
  request=$(state_of queued-resources) && node=$(state_of tpu-vm) || return
  if [[ $request ]]; then delete_request; elif [[ $node ]]; then delete_slice; else say "there is no $name"; fi
}

how_to_delete() { echo "./launch_tpu.sh delete --name=$name --zone=$zone${project:+ --project=$project}"; }

finish() { # CODE TEXT
  say "$2"
  if [[ $keep ]]; then
    say "$name is kept and costs money until: $(how_to_delete)"
  else
    remove || say "$name could not be deleted and may cost money: $(how_to_delete)"
  fi
  exit "$1"
}

run() {
  local begun="" broken=0 code failures=0 seconds try
  pack
  for ((try = 0; try <= retries; try++)); do
    if ((try)); then  # longer after every failure in a row
      seconds=$((pause << (failures < 4 ? failures++ : 4)))
      say "try $try of $retries in $seconds s"
      sleep "$seconds"
    fi
    bring_up || continue
    { [[ $slice != new ]] && attach; } || { install && start; } || {
      [[ $begun ]] || ((++broken < 5)) || {
        [[ $slice == new ]] || keep=yes  # a run of an earlier launcher may live on it
        finish 2 "$name could not be made to run; what is above says why"
      }
      continue
    }
    begun=$SECONDS
    watch || continue
    code=$(verdict)
    case $code in
      0) finish 0 "the run is finished" ;;
      75) say "the run stopped before its end; exit codes: $states" ;;
      *) finish "$code" "to start again would not help; exit codes: $states; what is above says why" ;;
    esac
    attempt=""
    ((SECONDS - begun < 600)) || failures=0
  done
  finish 75 "gave up, --retries=$retries are used up; the same command goes on from the state that was saved"
}

logs() {
  watch || fail "the workers of $name cannot be reached"
  say "the run ended; exit codes: $states"
  exit "$(verdict)"
}

status() {
  local now
  now=$(look) || fail "gcloud cannot say how $name is"
  echo "$name is $now"
  [[ $now != ready ]] || on_workers report || fail "the workers of $name cannot be reached"
}

plan() { # COMMAND: prints what it runs where nothing goes wrong
  case $1 in run | install) pack ;; esac
  case $1 in run | create) create ;; esac
  case $1 in run | create | status | delete) list queued-resources && list tpu-vm ;; esac
  case $1 in run | install) install ;; esac
  case $1 in run | start) start ;; esac
  case $1 in run | logs) on_workers follow ;; esac
  case $1 in run | logs | status) on_workers report ;; esac
  case $1 in stop) on_workers stop ;; esac
  case $1${keep:+, keep} in run | delete*) if [[ $queued ]]; then delete_request; else delete_slice; fi ;; esac
}

main() { # COMMAND OPTION...
  local command=${1:-}
  case $command in
    --help) usage; exit ;;
    run | create | install | start | logs | status | stop | delete) parse "${@:2}" ;;
    *) fail "unknown command '$command'; expected run, create, install, start, logs, status, stop, delete or --help" ;;
  esac
  check name zone
  case $command in run | create) check type && check_type ;; esac
  case $command in run | create) [[ $slices == 1 || $queued ]] || fail "--slices=$slices needs --queued" ;; esac
  case $command in run | install | start) check_commit ;; esac
  case $command in run | start) check_run ;; esac
  trap 'say "stopped watching; $name, if it is there, goes on and costs money until: $(how_to_delete)"; exit 130' \
    INT TERM HUP
  case ${dry_run:+plan for }$command in
    plan*) plan "$command" ;;
    run) run ;;
    create) bring_up || fail "$name did not become ready; look at: ./launch_tpu.sh status" ;;
    install) { pack && install; } || fail "not installed on all workers; what is above says why" ;;
    start) start || fail "not started on all workers; what is above says why" ;;
    logs) logs ;;
    status) status ;;
    stop) on_workers stop || fail "not stopped on all workers; what is above says why" ;;
    delete) remove || fail "$name was not deleted and may cost money; what is above says why" ;;
  esac
  exit  # here: bash reads a script while it runs, and this file may change while it waits for days
}

main "$@"
