#!/usr/bin/env bash
# Brings an mmpo command up on TPUs by SkyPilot: as a managed job, or on a cluster for trying things.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'END'
launch/sky.sh: mmpo by SkyPilot

  sky.sh run COMMAND       a managed job: TPUs are found, `mmpo COMMAND` is installed and run on all hosts,
                           started again elsewhere when they are taken away, and deleted at the end:
                           run align configs/RECIPE.yaml output=gs://...
  sky.sh status            of the job
  sky.sh logs              follow its log
  sky.sh resume [COMMAND]  run it again after it has ended; by default the last command
  sky.sh stop              cancel it

  sky.sh create                  a cluster that stays, with this checkout installed; deleted if that fails
  sky.sh run --cluster COMMAND   run there, without recovery; also status, logs and stop --cluster
  sky.sh delete [--yes]          delete the cluster
END
}

subcommand_flags() {
  case $1 in
    delete) echo --yes ;;
    run | status | logs | stop) echo --cluster ;;
    create | resume) echo ;;
    *) return 1 ;;
  esac
}

task_options() { # where, on what, and with which command; secrets by name alone: sky has them in its environment
  local infra=gcp
  [ -z "$zone" ] || infra=gcp/${zone%-*}/$zone
  options=("--gpus=tpu-$accelerator_type" "--infra=$infra")
  if [ "$spot" = true ]; then options+=(--use-spot); else options+=(--no-use-spot); fi
  command_options
}

command_options() {
  local key command=
  [ ${#words[@]} -eq 0 ] || command=$(quoted "${words[@]}")
  options+=("--workdir=$ROOT" "--env=MMPO_COMMAND=$command" "--env=MMPO_EXTRAS=$extras")
  for key in $(secrets_given); do options+=("--secret=$key"); done
}

cluster_exists() {
  local found
  if $dry_run; then
    execute sky status "$name"
    note "where it is absent, a creation that fails is followed by 'sky down':"
    return 1
  fi
  found=$(sky status "$name") || die 'the clusters cannot be asked for: nothing was done'
  grep -q "^$name " <<<"$found"
}

create() {
  local there=false
  if cluster_exists; then there=true; fi
  remove_created() {
    if $there; then die "$name was there before: it is left as it is"; fi
    say "creating $name did not succeed: what is there of it is deleted"
    execute sky down --yes "$name" || say "deleting it failed too: $SELF delete --yes"
    exit 1
  }
  $dry_run || trap remove_created INT TERM
  task_options
  execute sky launch --yes "--cluster=$name" "${options[@]}" "$ROOT/launch/sky.yaml" || remove_created
}

start() { # of words
  [ ! -f "${words[1]-}" ] || words[1]=$(in_checkout "${words[1]}")
  options=()
  if given --cluster; then
    command_options
    execute sky exec --detach-run "${options[@]}" "$name" "$ROOT/launch/sky.yaml"
  else
    remember_command
    task_options
    execute sky jobs launch --yes --detach-run "--name=$name" "${options[@]}" "$ROOT/launch/sky.yaml"
  fi
}

parse_arguments "$@"
read_config name accelerator_type
[ "$slices" = 1 ] || die 'slices: SkyPilot connects none; tpu.sh and gke.sh do'
case $subcommand in
  create) create ;;
  run | resume)
    [ "$subcommand" = run ] || recall_command
    check_command
    start
    ;;
  status) if given --cluster; then execute sky queue "$name"; else execute sky jobs queue; fi ;;
  logs) if given --cluster; then execute sky logs "$name"; else execute sky jobs logs "--name=$name"; fi ;;
  stop)
    if given --cluster; then
      execute sky cancel --yes --all "$name"
    else
      execute sky jobs cancel --yes "--name=$name"
    fi
    ;;
  delete)
    confirm "Delete the cluster $name and all that is on it?"
    execute sky down --yes "$name"
    ;;
esac
