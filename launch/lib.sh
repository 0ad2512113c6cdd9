# What tpu.sh, gke.sh and sky.sh share: options, the config file, dry runs, secrets, the checkout.
# shellcheck shell=bash source-path=SCRIPTDIR
# shellcheck disable=SC2034  # used by the scripts that source this

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SELF=${0##*/}
# shellcheck source=command.sh
source "$ROOT/launch/command.sh"

say() { printf '%s: %s\n' "$SELF" "$*" >&2; }
die() {
  say "$*"
  exit 1
}
misused() { # an error of the command line
  say "$*; see $SELF --help"
  exit 2
}

# --- options: SCRIPT [options] SUBCOMMAND [options] [WORD ...] ------------------------------------

subcommand=
words=()        # what stands behind the subcommand: of `run` the words of an mmpo command
flags=' '       # those given, between spaces: ' --keep --yes '
dry_run=false
config_file=${MMPO_LAUNCH_CONFIG:-$ROOT/launch/config}
settings=()     # --set KEY=VALUE
passed_on=()    # the options that a script hands to itself

usage_of_options() {
  cat <<'END'

  --config FILE      by default launch/config (see launch/config.example), or $MMPO_LAUNCH_CONFIG
  --set KEY=VALUE    one key of the config in its place
  --dry-run          show the commands, run none
END
}

given() { [[ $flags == *" $1 "* ]]; }

parse_arguments() { # needs usage and subcommand_flags of the script
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help)
        usage
        usage_of_options
        exit 0
        ;;
      --dry-run)
        dry_run=true
        passed_on+=(--dry-run)
        ;;
      --config | --set)
        [ $# -gt 1 ] || misused "$1 needs a value"
        if [ "$1" = --config ]; then config_file=$2; else settings+=("$2"); fi
        passed_on+=("$1" "$2")
        shift
        ;;
      -*) flags+="$1 " ;;
      *)
        if [ -n "$subcommand" ]; then
          words=("$@")
          break
        fi
        subcommand=$1
        ;;
    esac
    shift
  done
  [ -n "$subcommand" ] || misused 'which subcommand?'
  local known flag
  known=$(subcommand_flags "$subcommand") || misused "there is no subcommand '$subcommand'"
  for flag in $flags; do
    [[ " $known " == *" $flag "* ]] || misused "$subcommand has no option $flag"
  done
  if [[ $subcommand != run && $subcommand != resume && ${#words[@]} -gt 0 ]]; then
    misused "$subcommand takes no ${words[0]}"
  fi
}

# --- the config file: KEY = VALUE lines, of the keys below ----------------------------------------

KEYS='project zone name accelerator_type runtime_version slices spot bucket secrets python extras max_tries
poll_seconds create_flags ssh_flags cluster image'
project='' zone='' name='' accelerator_type='' runtime_version='' slices=1 spot=false bucket=''
secrets='HF_TOKEN WANDB_API_KEY' python=3.12 extras=tpu max_tries=20 poll_seconds=30
create_flags='' ssh_flags='' cluster='' image=''

set_key() { # WHERE KEY VALUE
  [[ " ${KEYS//$'\n'/ } " == *" $2 "* ]] || die "$1: there is no key '$2'; there are: ${KEYS//$'\n'/ }"
  printf -v "$2" '%s' "$3"
}

trimmed() { [[ $1 =~ ^[[:space:]]*(.*[^[:space:]])?[[:space:]]*$ ]] && printf '%s' "${BASH_REMATCH[1]}"; }

read_config() { # KEY ...: those that must have a value
  local line key value seen=' ' number=0
  [ -f "$config_file" ] || die "there is no $config_file: copy launch/config.example there"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=$(trimmed "$line")
    case $line in '' | '#'*) continue ;; esac
    [[ $line == *=* ]] || die "$config_file, line $number: no KEY = VALUE: $line"
    key=$(trimmed "${line%%=*}")
    value=${line#*=}
    value=$(trimmed "${value%%[[:space:]]#*}")
    [[ $seen != *" $key "* ]] || die "$config_file, line $number: $key stands twice"
    seen+="$key "
    set_key "$config_file, line $number" "$key" "$value"
  done <"$config_file"
  for line in ${settings[@]+"${settings[@]}"}; do
    [[ $line == *=* ]] || misused "--set $line: no KEY=VALUE"
    set_key '--set' "${line%%=*}" "${line#*=}"
  done
  for key in "$@"; do
    [ -n "${!key}" ] || die "$config_file: $key has no value"
  done
  check_config
}

check_config() {
  local key
  [[ -z $project || $project =~ ^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$ ]] ||
    die "project: '$project' is no id of a Google Cloud project"
  [[ -z $zone || $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
    die "zone: '$zone' is no zone, such as us-west4-a; a region has no letter at its end"
  for key in name cluster; do
    [[ -z ${!key} || ${!key} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
      die "$key: '${!key}' is not made of at most 40 small letters, digits and inner dashes"
  done
  [[ $spot == true || $spot == false ]] || die "spot: '$spot' is neither true nor false"
  for key in slices max_tries; do
    [[ ${!key} =~ ^[1-9][0-9]*$ ]] || die "$key: '${!key}' is no number above 0"
  done
  [[ $poll_seconds =~ ^[0-9]+$ ]] || die "poll_seconds: '$poll_seconds' is no number of seconds"
  [[ $python =~ ^3\.(1[1-9])$ ]] || die "python: '$python' is no version from 3.11 on"
  [[ $extras =~ ^[a-z0-9]+(,[a-z0-9]+)*$ ]] || die "extras: '$extras' are no names with commas between"
  for key in $secrets; do
    [[ $key =~ ^[A-Z_][A-Z0-9_]*$ ]] ||
      die 'secrets: names of environment variables, in capitals, and not the secrets themselves'
  done
  bucket=${bucket#gs://}
  bucket=${bucket%/}
  if [ -n "$accelerator_type" ]; then check_accelerator_type; fi
}

check_accelerator_type() { # v5p and older count cores, of which a chip has two; the others chips
  local hint=''
  case $accelerator_type in
    v5litepod-1 | v5litepod-4 | v5litepod-8 | v5litepod-16 | v5litepod-32 | v5litepod-64 | \
      v5litepod-128 | v5litepod-256) return ;;
    v6e-1 | v6e-4 | v6e-8 | v6e-16 | v6e-32 | v6e-64 | v6e-128 | v6e-256) return ;;
    v[234]-* | v5p-*)
      [[ ${accelerator_type#*-} =~ ^[1-9][0-9]*$ ]] && ((${accelerator_type#*-} % 8 == 0)) && return
      hint='; it counts cores, two to a chip, by 8'
      ;;
    tpu7x-*)
      [[ $SELF != gke.sh ]] || return 0
      hint='; tpu7x is to be had on GKE alone: gke.sh'
      ;;
    v5e-*) hint="; v5e is called v5litepod-${accelerator_type#*-} there" ;;
  esac
  die "accelerator_type: '$accelerator_type' is none, such as v5litepod-64, v6e-256, v5p-128$hint"
}

# --- what runs, and what --dry-run shows ----------------------------------------------------------

quoted() { # the words as bash reads them back
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

execute() {
  if $dry_run; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

note() { ! $dry_run || printf '# %s\n' "$*"; } # what a dry run cannot show as a command

confirm() { # WHAT
  $dry_run || given --yes && return
  local answer=
  read -r -p "$1 [y/N] " answer || true
  [[ $answer == [yY]* ]] || die 'nothing was done'
}

# --- the checkout ---------------------------------------------------------------------------------

checkout_files() { # all that git knows of or would add, as it is now, uncommitted changes included
  git -C "$ROOT" rev-parse --git-dir >/dev/null 2>&1 || die "$ROOT is no git checkout"
  local file
  git -C "$ROOT" -c core.quotePath=false ls-files --cached --others --exclude-standard |
    LC_ALL=C sort -u | while IFS= read -r file; do
    [ ! -f "$ROOT/$file" ] || printf '%s\n' "$file"
  done
}

checkout_digest() { # of the files' names and contents
  local files
  files=$(checkout_files)
  { printf '%s\n' "$files" && printf '%s\n' "$files" | git -C "$ROOT" hash-object --stdin-paths; } |
    git hash-object --stdin | cut -c1-12
}

in_checkout() { # FILE: its path from the checkout's root
  local folder
  folder=$(cd "$(dirname "$1")" && pwd -P)
  case $folder/ in
    "$(cd "$ROOT" && pwd -P)"/*) ;;
    *) die "$1 does not lie in $ROOT, and nothing else is copied" ;;
  esac
  folder=${folder#"$(cd "$ROOT" && pwd -P)"}
  folder=${folder#/}
  printf '%s' "${folder:+$folder/}$(basename "$1")"
}

# --- the mmpo command of `run` --------------------------------------------------------------------

check_command() { # of words; puts the output into the bucket, where one is given and no output
  [ "${words[0]-}" != mmpo ] || words=("${words[@]:1}")
  [ ${#words[@]} -gt 0 ] || misused "$subcommand needs an mmpo command: align RECIPE [key=value ...]"
  check_words "$subcommand" "${words[@]}"
  # The recipe: `resume` may be called in another folder.
  [ ! -f "${words[1]-}" ] || words[1]=$(cd "$(dirname "${words[1]}")" && pwd)/$(basename "${words[1]}")
  case ${words[0]} in
    align | train | generate | score | select) ;;
    *) return 0 ;;
  esac
  local word before='' output=''
  for word in "${words[@]}"; do
    case $word in output=* | --output=*) output=${word#*=} ;; esac
    [ "$before" != --output ] || output=$word
    before=$word
  done
  if [ -z "$output" ] && [[ -n $bucket && (${words[0]} == align || ${words[0]} == train) ]]; then
    output=gs://$bucket/$name
    words+=("output=$output")
  fi
  if [ -z "$output" ] && [ -f "${words[1]-}" ]; then
    output=$(sed -n "s/^output: *[\"']\{0,1\}//p" "${words[1]}")
  fi
  [[ $output != gs://* ]] || return 0
  local told="the output '$output' lies in no bucket (gs://...) and is lost with the machine"
  if [ "$SELF" != tpu.sh ] || given --keep; then die "$told"; fi
  say "$told"
}

# What a later `resume` starts again, as words with a zero byte behind each.
state_folder() { printf '%s' "${XDG_STATE_HOME:-$HOME/.local/state}/mmpo_launch/$name"; }

remember_command() {
  if $dry_run; then return; fi
  mkdir -p "$(state_folder)"
  printf '%s\0' "${words[@]}" >"$(state_folder)/command"
}

recall_command() { # what was given to resume, or what ran last
  local word
  [ ${#words[@]} -eq 0 ] || return 0
  [ -f "$(state_folder)/command" ] || die "nothing was run as $name from here: give the command"
  while IFS= read -r -d '' word; do words+=("$word"); done <"$(state_folder)/command"
}

# --- secrets: named in the config, taken from the environment, shown nowhere ----------------------

secrets_given() { # the names of those that have a value
  local key
  [[ $extras =~ ^[a-z0-9]+(,[a-z0-9]+)*$ ]] || die "extras: '$extras' are no names with commas between"
  for key in $secrets; do
    [ -z "${!key-}" ] || printf '%s\n' "$key"
  done
}
