#!/usr/bin/env bash
# Runs an mmpo command on this host, whatever it is: a host of a TPU VM, a GPU machine, a laptop.
# tpu.sh, gke.sh and sky.sh call it on every host of theirs.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=command.sh
source "$ROOT/launch/command.sh"
SCRIPT=$ROOT/launch/run.sh
HOME_FOLDER=${MMPO_HOME:-$HOME/.mmpo}
VENV=$HOME_FOLDER/venv
RUN=$HOME_FOLDER/run # command, log, pid; exit, stopped and asked when it has ended

usage() {
  cat <<'END'
launch/run.sh: an mmpo command on this host

  run.sh install [--extras tpu] [--python 3.12]   this checkout into ~/.mmpo/venv, with extras of pyproject.toml
  run.sh run [--foreground] COMMAND ...    mmpo COMMAND in the background; a lost terminal does not stop it
  run.sh status                            what has become of it: idle, running, finished, stopped, interrupted, failed, lost
  run.sh logs [--no-follow]                its log, this host's name in front of every line
  run.sh stop                              SIGTERM, with which it saves and ends; waits for the end

  --dry-run   show the commands, run none

For several hosts without a TPU's environment give each JAX_COORDINATOR_ADDRESS (host:port of the
first), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Lines NAME=VALUE of ~/.mmpo/secrets (mode 600) are put
into the environment. MMPO_HOME names another folder than ~/.mmpo.
END
}

say() { printf 'run.sh: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}
misused() {
  say "$*; see run.sh --help"
  exit 2
}

extras='' python=3.12 digest='' dry_run=false foreground=false follow=true
subcommand=
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --extras | --python | --digest)
      [ $# -gt 1 ] || misused "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --dry-run) dry_run=true ;;
    --foreground) foreground=true ;;
    --no-follow) follow=false ;;
    -*) misused "there is no option $1" ;;
    *)
      [ -z "$subcommand" ] || break
      subcommand=$1
      ;;
  esac
  shift
done

execute() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

is_running() { # by more than the number, which another process may have after a restart of the host
  local pid
  pid=$(cat "$RUN/pid" 2>/dev/null) && ps -o args= -p "$pid" 2>/dev/null | grep -q 'run\.sh supervise'
}

find_uv() { # uv brings a Python of its own, as TPU VMs have 3.10
  if command -v uv; then return; fi
  [ -x "$HOME_FOLDER/uv/bin/uv" ] || execute python3 -m pip install --quiet --target "$HOME_FOLDER/uv" uv >&2
  echo "$HOME_FOLDER/uv/bin/uv"
}

install_checkout() {
  local uv key target=$ROOT
  [[ $extras =~ ^[a-z0-9,]*$ ]] || misused "--extras '$extras' are no names with commas between"
  [ -z "$extras" ] || target+="[$extras]"
  ! is_running || die 'a run is going on: stop it first'
  # Without a digest nothing says whether the checkout has changed, and it is installed again.
  key="${digest:-$RANDOM$RANDOM} $extras $python"
  if [ -x "$VENV/bin/mmpo" ] && [ "$(cat "$HOME_FOLDER/installed" 2>/dev/null)" = "$key" ]; then
    say 'this checkout is installed already'
    return
  fi
  uv=$(find_uv)
  execute rm -rf "$VENV" "$HOME_FOLDER/installed"
  execute "$uv" venv --quiet --python "$python" "$VENV"
  execute "$uv" pip install --quiet --python "$VENV/bin/python" "$target"
  $dry_run || printf '%s\n' "$key" >"$HOME_FOLDER/installed"
}

find_mmpo() {
  local candidate
  for candidate in "$VENV/bin/mmpo" "$(command -v mmpo || true)" "$ROOT/.venv/bin/mmpo"; do
    if [ -x "$candidate" ]; then
      echo "$candidate"
      return
    fi
  done
  if $dry_run; then echo mmpo; else die 'mmpo is not installed here: run.sh install'; fi
}

check_processes() {
  local name given=0
  for name in JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID; do
    [ -z "${!name-}" ] || given=$((given + 1))
  done
  [[ $given == 0 || $given == 3 ]] ||
    die 'JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID: all three or none'
}

read_secrets() {
  local name value
  [ -f "$HOME_FOLDER/secrets" ] || return 0
  while IFS='=' read -r name value; do export "$name=$value"; done <"$HOME_FOLDER/secrets"
}

# Runs the command and keeps how it ended. SIGTERM goes on to it: of a machine that is taken away,
# or of `stop`. The status is then 143 whatever the run's own is, 0 where it has saved, so that nobody
# takes a run that was cut off for a finished one, or for one that failed.
supervise() {
  local child='' status=0 stopped=false mmpo
  mmpo=$(find_mmpo)
  read_secrets
  trap 'stopped=true; kill -TERM "$child" 2>/dev/null || true' TERM INT
  "$mmpo" "$@" &
  child=$!
  ! $stopped || kill -TERM "$child" # it came before there was whom to tell
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break # else the wait ended for the signal alone
  done
  wait "$child" && status=0 || status=$?
  if $stopped; then status=143; fi
  if [ -d "$RUN" ]; then
    echo "$status" >"$RUN/exit.new"
    mv "$RUN/exit.new" "$RUN/exit"
  fi
  return "$status"
}

shown_command() {
  local word line=mmpo
  while IFS= read -r -d '' word; do printf -v line '%s %q' "$line" "$word"; done <"$RUN/command"
  printf '%s' "$line"
}

start_run() {
  [ "${1-}" != mmpo ] || shift
  [ $# -gt 0 ] || misused 'run needs an mmpo command: align RECIPE [key=value ...]'
  check_words run "$@"
  local mmpo
  check_processes
  mmpo=$(find_mmpo)
  if $dry_run; then
    execute "$mmpo" "$@"
    return
  fi
  if $foreground; then
    supervise "$@"
    return
  fi
  ! is_running || die "a run is going on: $(shown_command)"
  mkdir -p "$RUN"
  rm -f "$RUN/exit" "$RUN/asked"
  printf '%s\0' "$@" >"$RUN/command"
  printf -- '--- %s %s\n' "$(date -u +%FT%TZ)" "$(shown_command)" >>"$RUN/log"
  set -m # a process group of its own: nothing that ends this shell reaches it
  nohup bash "$SCRIPT" supervise "$@" </dev/null >>"$RUN/log" 2>&1 &
  echo $! >"$RUN/pid"
  say "started: $(shown_command)"
}

tell_status() {
  local state exit_status
  if [ ! -f "$RUN/command" ]; then
    state=idle
  elif is_running; then
    state='running'
  elif exit_status=$(cat "$RUN/exit" 2>/dev/null); then
    case $exit_status in
      0) state=finished ;;
      143) [ -f "$RUN/asked" ] && state=stopped || state=interrupted ;;
      *) state="failed with status $exit_status" ;;
    esac
  else
    state=lost # killed, or the host restarted
  fi
  printf '%s: %s' "$(hostname)" "$state"
  [ "$state" = idle ] || printf ': %s' "$(shown_command)"
  echo
}

follow_log() {
  local host
  [ -f "$RUN/log" ] || die 'nothing was run here'
  host=$(hostname)
  local tail_options=()
  if $follow && is_running; then tail_options=(-F --pid="$(cat "$RUN/pid")" -s 0.2); fi
  execute tail -n +1 ${tail_options[@]+"${tail_options[@]}"} "$RUN/log" 2>/dev/null | sed -u "s/^/$host: /"
  $dry_run || tell_status
}

stop_run() {
  local waited=0
  is_running || {
    say 'nothing runs here'
    return
  }
  execute touch "$RUN/asked"
  execute kill -TERM "$(cat "$RUN/pid")"
  ! $dry_run || return 0
  while is_running; do
    sleep 0.2
    waited=$((waited + 1))
    if ((waited % 50 == 0)); then say "saving, for $((waited / 5)) s"; fi
    ((waited < 4500)) || die 'it has not ended after 15 minutes; it may still be saving'
  done
  tell_status
}

if [[ $subcommand != run && $subcommand != supervise && $# -gt 0 ]]; then
  misused "$subcommand takes no $1"
fi
case $subcommand in
  install) install_checkout ;;
  run) start_run "$@" ;;
  supervise) supervise "$@" ;; # of `run` alone
  status) tell_status ;;
  logs) follow_log ;;
  stop) stop_run ;;
  '') misused 'which subcommand?' ;;
  *) misused "there is no subcommand '$subcommand'" ;;
esac
