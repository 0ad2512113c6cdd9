#!/usr/bin/env bash
# Brings an mmpo command up on TPUs of a GKE cluster, by XPK.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'END'
launch/gke.sh: mmpo on GKE, by XPK

  gke.sh create            make the cluster with `slices` slices of the accelerator type; a new cluster whose
                           creation fails is deleted
  gke.sh install           build the image of this checkout and push it (docker)
  gke.sh run COMMAND       start `mmpo COMMAND` on all hosts: run align configs/RECIPE.yaml output=gs://...
                           What is taken away starts again, `max_tries` times at most
  gke.sh status            of the workload
  gke.sh logs              follow the logs of all hosts (kubectl)
  gke.sh resume [COMMAND]  delete the workload and run it again; by default the last command
  gke.sh stop              delete the workload: the run has five minutes to save
  gke.sh delete [--yes]    delete the cluster
END
}

subcommand_flags() {
  case $1 in
    delete) echo --yes ;;
    create | install | run | status | logs | resume | stop) echo ;;
    *) return 1 ;;
  esac
}

xpk_on_cluster() { # NOUN VERB [FLAG ...]
  execute xpk "$1" "$2" "--cluster=$cluster" "--project=$project" "--zone=$zone" "${@:3}"
}

cluster_exists() {
  local found
  found=$(execute gcloud container clusters list "--project=$project" "--filter=name=$cluster" '--format=value(name)') ||
    die 'the clusters cannot be asked for: nothing was done'
  if $dry_run; then
    printf '%s\n' "$found"
    note "where it is absent, a creation that fails is followed by 'xpk cluster delete':"
    return 1
  fi
  [ -n "$found" ]
}

create() {
  local there=false capacity=--on-demand
  if cluster_exists; then there=true; fi
  [ "$spot" = false ] || capacity=--spot
  case $create_flags in *--reservation* | *--flex*) capacity='' ;; esac
  remove_created() {
    if $there; then die "$cluster was there before: it is left as it is"; fi
    say "creating $cluster did not succeed: what is there of it is deleted"
    xpk_on_cluster cluster delete --force || say "deleting it failed too: $SELF delete --yes"
    exit 1
  }
  $dry_run || trap remove_created INT TERM
  # shellcheck disable=SC2086  # words
  xpk_on_cluster cluster create "--tpu-type=$accelerator_type" "--num-slices=$slices" \
    $capacity $create_flags || remove_created
}

image_of_checkout() { # the tag is the checkout's digest: an image that a run names is never another
  local digest
  digest=$(checkout_digest)
  printf '%s:%s' "$image" "$digest"
}

install() {
  local tagged
  tagged=$(image_of_checkout)
  execute docker build "--tag=$tagged" "--file=$ROOT/launch/Dockerfile" "--build-arg=EXTRAS=$extras" "$ROOT"
  execute docker push "$tagged"
}

# The container's shell is replaced by run.sh, so that it gets the signal of a pod that has to go.
# A status of 1 starts the workload again as well: hosts whose peer was taken away may end with it.
start() { # of words
  local tagged command file names
  [ ! -f "${words[1]-}" ] || words[1]=$(in_checkout "${words[1]}")
  tagged=$(image_of_checkout)
  command="exec bash launch/run.sh run --foreground $(quoted "${words[@]}")"
  names=$(secrets_given)
  local options=("--workload=$name" "--tpu-type=$accelerator_type" "--num-slices=$slices"
    "--docker-image=$tagged" "--command=$command" "--max-restarts=$max_tries"
    --restart-on-exit-codes=1 --termination-grace-period-seconds=300)
  if [ -n "$names" ]; then # names alone: xpk takes the values from its environment
    file=$(state_folder)/environment
    note "the file names ${names//$'\n'/ }"
    if ! $dry_run; then
      mkdir -p "$(state_folder)"
      printf '%s\n' "$names" >"$file"
    fi
    options+=("--env-file=$file")
  fi
  remember_command
  xpk_on_cluster workload create "${options[@]}"
}

follow_logs() {
  execute gcloud container clusters get-credentials "$cluster" "--project=$project" "--region=${zone%-*}"
  execute kubectl logs --follow --prefix --all-containers --tail=-1 --max-log-requests=1024 \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name"
}

parse_arguments "$@"
read_config project zone name accelerator_type cluster
case $subcommand in
  create) create ;;
  install | run | resume)
    [ -n "$image" ] || die "$config_file: image has no value"
    [[ ${image##*/} != *:* ]] || die "image: '$image' has a tag; it gets the checkout's digest as its tag"
    [ "$subcommand" != resume ] || recall_command
    if [ "$subcommand" = install ]; then
      install
    else
      check_command
      [ "$subcommand" = run ] || xpk_on_cluster workload delete "--workload=$name" --force
      start
    fi
    ;;
  status) xpk_on_cluster workload list "--filter-by-job=$name" ;;
  logs) follow_logs ;;
  stop) xpk_on_cluster workload delete "--workload=$name" --force ;;
  delete)
    confirm "Delete the cluster $cluster and all that runs on it?"
    xpk_on_cluster cluster delete --force
    ;;
esac
