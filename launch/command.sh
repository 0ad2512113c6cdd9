# What every script asks of the words of an mmpo command before it does anything with them.
# shellcheck shell=bash
# The script that sources this has `misused`, for errors of the command line.

check_words() { # SUBCOMMAND WORD ...: of the script, and the mmpo command behind it
  local subcommand=$1 command=$2 recipe=${3-} word
  shift
  for word in "$@"; do # mmpo has none of these, and would get them all
    case ${word%%=*} in
      --dry-run | --config | --set | --yes | --keep | --no-wait | --cluster | --foreground)
        misused "put ${word%%=*} before $subcommand: what stands behind it is mmpo's"
        ;;
    esac
  done
  case $command in
    align | train | generate | score | reward | select | evaluate | plan | serve)
      case $recipe in
        '' | -* | *=* | *://*) ;;
        *) [ -f "$recipe" ] || misused "$command: there is no recipe $recipe here" ;;
      esac
      ;;
    convert | correct | objectives | report | data | -h | --help) ;;
    *) misused "mmpo has no subcommand '$command'" ;;
  esac
}
