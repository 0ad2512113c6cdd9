#!/usr/bin/env bash
# Brings an mmpo command up on a Cloud TPU VM of one or many hosts, by gcloud and queued resources.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'END'
launch/tpu.sh: mmpo on Cloud TPU VMs

  tpu.sh create [--no-wait]      ask for the TPU and wait until it is there; a creation that fails or is
                                 interrupted leaves nothing behind
  tpu.sh install                 copy this checkout to every host and install it, unless it is there already
  tpu.sh run [--keep] COMMAND    start `mmpo COMMAND` on all hosts: run align recipe.yaml output=gs://...
                                 --keep: watch it to its end; a TPU that was taken away is created again,
                                 and the command goes on from its output
  tpu.sh status                  of the TPU and of the run on every host
  tpu.sh logs                    follow the logs of all hosts
  tpu.sh resume [--keep] [COMMAND]   create, install and run again whatever is lost; by default the last command
  tpu.sh stop                    SIGTERM on all hosts: the run saves and ends
  tpu.sh delete [--yes]          delete the TPU
END
}

subcommand_flags() {
  case $1 in
    create) echo --no-wait ;;
    run | resume) echo --keep ;;
    delete) echo --yes ;;
    install | status | logs | stop) echo ;;
    *) return 1 ;;
  esac
}

# --- gcloud ---------------------------------------------------------------------------------------

place() { printf '%s\n' "--project=$project" "--zone=$zone"; }

queued_resource() { # VERB [FLAG ...]
  local verb=$1
  shift
  # shellcheck disable=SC2046  # two words
  execute gcloud compute tpus queued-resources "$verb" "$name" "$@" $(place)
}

nodes() {
  local index
  if [ "$slices" = 1 ]; then
    echo "$name"
  else
    for ((index = 0; index < slices; index++)); do echo "$name-$index"; done
  fi
}

hosts() { # VERB WORD ...: ssh or scp, to all hosts of all slices at once
  local verb=$1 group=(tpu-vm) every=(--worker=all)
  shift
  if [ "$slices" != 1 ]; then
    group=(queued-resources)
    every+=(--node=all --batch-size=all)
  fi
  # shellcheck disable=SC2046,SC2086  # words
  execute gcloud compute tpus "${group[@]}" "$verb" "$@" "${every[@]}" $ssh_flags $(place)
}

on_hosts() { hosts ssh "$name" "--command=$1"; } # SHELL_COMMAND

copy_to_hosts() { hosts scp "$1" "$name:$2" --scp-flag=-p; } # FILE TARGET: of a home folder

# --- states ---------------------------------------------------------------------------------------

resource_state() { # of the queued resource, ABSENT, or UNKNOWN where gcloud cannot say
  local state errors
  errors=$(mktemp)
  if state=$(queued_resource describe '--format=value(state.state)' 2>"$errors"); then
    echo "${state:-UNKNOWN}"
  elif grep -qi 'not.found' "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

is_taken_away() { # a resource can be ACTIVE for a while after its machines are gone
  local node state
  for node in $(nodes); do
    # shellcheck disable=SC2046
    state=$(gcloud compute tpus tpu-vm describe "$node" '--format=value(state)' $(place) 2>/dev/null) || continue
    case $state in PREEMPTED | TERMINATED | STOPPED) return 0 ;; esac
  done
  return 1
}

wait_until_active() { # fails where it will never be
  local state before=''
  if $dry_run; then
    note 'again and again, until the state is ACTIVE:'
    queued_resource describe '--format=value(state.state)'
    return
  fi
  while :; do
    state=$(resource_state)
    [ "$state" = "$before" ] || say "$name is $state"
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT) return 1 ;;
    esac
    sleep "$poll_seconds"
  done
}

# What `run.sh status` says, or that it is not there.
# shellcheck disable=SC2016  # the hosts' shells expand it
STATUS='if cd .mmpo/source 2>/dev/null; then bash launch/run.sh status; else echo "$(hostname): uninstalled"; fi'

run_states() { # one word for every host; fails without an answer
  local answer
  answer=$(on_hosts "$STATUS" 2>/dev/null) || return 1
  sed -n 's/^[^ ]*: \([a-z]*\).*/\1/p' <<<"$answer"
}

# --- what the subcommands do ----------------------------------------------------------------------

on_host() { # WORD ...: run.sh's, as a shell command for the hosts
  printf 'cd .mmpo/source && bash launch/run.sh %s' "$(quoted "$@")"
}

runtime_of_type() {
  case $accelerator_type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

remove_created() {
  say "creating $name did not succeed: what is there of it is deleted"
  queued_resource delete --force --quiet || say "deleting it failed too: $SELF delete --yes"
}

create() {
  local state=ABSENT options=("--node-id=$name")
  [ "$slices" = 1 ] || options=("--node-count=$slices" "--node-prefix=$name")
  options+=("--accelerator-type=$accelerator_type" "--runtime-version=${runtime_version:-$(runtime_of_type)}")
  [ "$spot" = false ] || options+=(--spot)
  if $dry_run; then
    queued_resource describe '--format=value(state.state)'
    note 'where it is absent:'
  else
    state=$(resource_state)
  fi
  case $state in
    ABSENT) ;;
    UNKNOWN) die 'the state of the TPU cannot be asked for: nothing was done' ;;
    FAILED | SUSPENDED) die "$name is $state: $SELF resume, or delete" ;;
    *)
      say "$name is there already"
      given --no-wait || wait_until_active || die "$name was lost"
      return
      ;;
  esac
  # From here on there may be something that nobody but this process asked for.
  $dry_run || trap 'remove_created; exit 1' INT TERM
  if ! { request_resource "${options[@]}" && { given --no-wait || wait_until_active; }; }; then
    trap - INT TERM
    [ "$(resource_state)" = ABSENT ] || remove_created
    die "$name was not created"
  fi
  trap - INT TERM
}

request_resource() { # FLAG ...
  local errors status=0
  errors=$(mktemp)
  # shellcheck disable=SC2086  # words
  queued_resource create "$@" $create_flags 2>"$errors" || status=$?
  cat "$errors" >&2
  if [ "$status" != 0 ] && grep -qi 'already.exists' "$errors"; then
    trap - INT TERM
    die "somebody else created $name just now: nothing is deleted"
  fi
  rm -f "$errors"
  return "$status"
}

install() {
  local digest archive
  digest=$(checkout_digest)
  archive=$(state_folder)/checkout.tar.gz
  if ! $dry_run; then
    mkdir -p "$(state_folder)"
    checkout_files | tar -C "$ROOT" -czf "$archive" -T -
  fi
  on_hosts 'umask 077 && mkdir -p .mmpo'
  copy_to_hosts "$archive" .mmpo/checkout.tar.gz
  local target=.mmpo/checkout-$digest
  on_hosts "mkdir -p $target && tar -xzf .mmpo/checkout.tar.gz -C $target &&\
 bash $target/launch/run.sh install --extras $extras --python $python --digest $digest &&\
 ln -sfn ${target##*/} .mmpo/source &&\
 find .mmpo -maxdepth 1 -name 'checkout-*' ! -name ${target##*/} -exec rm -rf {} +"
}

send_secrets() { # in a file of mode 600 on both sides; the hosts' old one goes where none is set
  local key file names
  names=$(secrets_given)
  if [ -z "$names" ]; then
    on_hosts 'rm -f .mmpo/secrets'
    return
  fi
  file=$(state_folder)/secrets
  note "the file holds ${names//$'\n'/ }"
  if ! $dry_run; then
    mkdir -p "$(state_folder)"
    trap 'rm -f "$(state_folder)/secrets"' EXIT
    (
      umask 077
      rm -f "$file"
      for key in $names; do
        [[ ${!key} != *$'\n'* ]] || die "$key has more than one line"
        printf '%s=%s\n' "$key" "${!key}"
      done >"$file"
    )
  fi
  copy_to_hosts "$file" .mmpo/secrets
  on_hosts 'chmod 600 .mmpo/secrets'
  $dry_run || rm -f "$file"
}

start() { # of words
  local states command
  if ! $dry_run; then
    states=$(run_states) || die "not every host answers: $SELF status"
    [[ $states != *uninstalled* ]] || die "mmpo is not there: $SELF install"
    [[ $states != *running* ]] || die "a run is going on: $SELF status, logs or stop"
  fi
  send_secrets
  command=$(on_host run "${words[@]}")
  if [ -f "${words[1]-}" ]; then # the recipe, as it is here and now
    copy_to_hosts "${words[1]}" .mmpo/recipe.yaml
    command=$(on_host run "${words[0]}" ../recipe.yaml ${words[@]+"${words[@]:2}"})
  fi
  remember_command
  if ! on_hosts "$command"; then
    say 'not every host started it: those that did are stopped'
    on_hosts "$(on_host stop)" || true
    die 'not started'
  fi
}

again() { bash "$0" ${passed_on[@]+"${passed_on[@]}"} "$@"; } # in a process: its errors end it alone

bring_back() { # all that is missing of a TPU in this state
  case $1 in
    SUSPENDED | FAILED | PREEMPTED) again delete --yes && again create && again install ;;
    ABSENT) again create && again install ;;
    *) wait_until_active && again install ;;
  esac && again run "${words[@]}"
}

# Looks after a run until it has ended by itself, or by `stop`. What is seen once may be half of
# something: of a TPU that is taken away single hosts fail first. So a failure counts when the state
# of the TPU has stayed the same for `SETTLED` looks. Hosts that were lost, or told to end, take the
# others with them. Tries are forgotten of a run that went well for `WELL` looks.
SETTLED=5
WELL=20
keep() {
  local state states tries=0 looks=0 well=0 pause
  if $dry_run; then
    note 'again and again, until every host has finished:'
    queued_resource describe '--format=value(state.state)'
    on_hosts "$STATUS"
    note 'and whenever the TPU was taken away:'
    bring_back SUSPENDED
    return
  fi
  while :; do
    sleep "$poll_seconds"
    state=$(resource_state)
    states=
    case $state in
      ACTIVE)
        states=$(run_states | sort -u | tr '\n' ' ') || states='unreachable '
        case $states in
          'finished ')
            say 'finished'
            return
            ;;
          'running ')
            looks=0
            well=$((well + 1))
            ((well < WELL)) || tries=0
            continue
            ;;
          *running*) # the others of a failed host end within a minute
            say "some hosts' runs have ended: $states"
            continue
            ;;
          *stopped*)
            say 'stopped; resume goes on'
            return
            ;;
        esac
        looks=$((looks + 1))
        say "$name is $state; the hosts' runs: $states"
        if is_taken_away; then
          state=PREEMPTED
        elif ((looks < SETTLED)) || [ "$states" = 'unreachable ' ]; then
          continue
        elif [[ $states == *failed* && $states != *lost* && $states != *interrupted* ]]; then
          die "the run failed, and the TPU is well: $SELF logs"
        fi
        ;;
      SUSPENDED | FAILED | ABSENT) ;;
      *)
        say "$name is $state"
        continue
        ;;
    esac
    looks=0
    well=0
    tries=$((tries + 1))
    ((tries <= max_tries)) || die "given up after $max_tries tries (max_tries)"
    pause=$((poll_seconds * (tries < 7 ? 2 ** (tries - 1) : 60)))
    say "$name is $state: try $tries of $max_tries to bring the run back, in $pause s"
    sleep "$pause"
    bring_back "$state" || say 'that did not succeed'
  done
}

resume() {
  local state=SUSPENDED
  if $dry_run; then
    queued_resource describe '--format=value(state.state)'
    note 'where it is SUSPENDED:'
  else
    state=$(resource_state)
    [ "$state" != UNKNOWN ] || die 'the state of the TPU cannot be asked for: nothing was done'
    ! { [ "$state" = ACTIVE ] && is_taken_away; } || state=PREEMPTED
    if [[ $state == ACTIVE && $(run_states || true) == *running* ]]; then
      say 'it is running'
      return
    fi
  fi
  bring_back "$state" || die 'it is not running again'
}

tell_status() {
  local state=ACTIVE answer
  if $dry_run; then queued_resource describe '--format=value(state.state)'; else state=$(resource_state); fi
  $dry_run || echo "$name: $state"
  [ "$state" != UNKNOWN ] || die 'the state of the TPU cannot be asked for'
  [ "$state" = ACTIVE ] || return 0
  answer=$(on_hosts "$STATUS") || die 'not every host answers'
  printf '%s\n' "$answer"
  [[ ! $answer =~ :\ (failed|lost) ]] || return 1
}

parse_arguments "$@"
read_config project zone name accelerator_type
$dry_run || command -v gcloud >/dev/null || die 'gcloud is not installed here'
case $subcommand in
  create) create ;;
  install) install ;;
  run | resume)
    [ "$subcommand" = run ] || recall_command
    check_command
    if [ "$subcommand" = run ]; then start; else resume; fi
    ! given --keep || keep
    ;;
  status) tell_status ;;
  logs) on_hosts "$(on_host logs)" ;;
  stop) on_hosts "$(on_host stop)" ;;
  delete)
    confirm "Delete the TPU $name and all that is on its hosts?"
    queued_resource delete --force --quiet
    ;;
esac
