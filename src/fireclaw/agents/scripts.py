"""The shell scripts that the file tools and background commands run in the machine, and what their statuses mean.

POSIX sh with the small tools that every image has, GNU's or busybox's: an image needs no Python for them. They run as
the agent's user, so the kernel decides what may be read and written; paths travel as arguments, never inside a script.
"""

from __future__ import annotations

from typing import Final

DESK: Final = "/tmp/fireclaw"  # noqa: S108 (in the machine) - outputs that were too long, and background commands
KEPT_OUTPUTS: Final = 8

MISSING, FOLDER, SPECIAL, REFUSED, FAILED, DANGLING = range(81, 87)

# $1 is a path as a model writes it; $p is then it, and $d its folder.
_PATH: Final = r"""
p=$1
case $p in
    '~') p=$HOME ;;
    '~/'*) p=$HOME/${p#??} ;;
    -*) p=./$p ;;
esac
case $p in
    /*/*) d=${p%/*} ;;
    /*) d=/ ;;
    */*) d=${p%/*} ;;
    *) d=. ;;
esac
"""

_READABLE: Final = (
    _PATH
    + rf"""
if [ ! -e "$p" ]; then
    [ -h "$p" ] && exit {DANGLING}
    [ -d "$d" ] && [ ! -x "$d" ] && exit {REFUSED}
    ls -A -- "$d" 2>/dev/null | head -n 40
    exit {MISSING}
fi
[ -d "$p" ] && exit {FOLDER}
[ -f "$p" ] || exit {SPECIAL}
[ -r "$p" ] || exit {REFUSED}
"""
)

# $2 first line, $3 bytes. Writes how many line ends and bytes the file has, then its bytes from that line on.
READ: Final = (
    _READABLE
    + r"""
wc -lc < "$p"
if [ "$2" = 1 ]; then exec head -c "$3" < "$p"; fi
tail -n "+$2" < "$p" | head -c "$3"
"""
)

# $2 bytes. Writes so many of the file's.
READ_WHOLE: Final = (
    _READABLE
    + r"""
exec head -c "$2" < "$p"
"""
)

# $2 "append" or "replace", $3 a word that nobody guesses; the content is on stdin. A new file appears whole or not at
# all; one that is there keeps its mode, and where it is a link, it stays one. After an append writes the size.
WRITE: Final = (
    _PATH
    + rf"""
[ -d "$p" ] && exit {FOLDER}
[ -e "$p" ] && [ ! -f "$p" ] && exit {SPECIAL}
[ -e "$p" ] && [ ! -w "$p" ] && exit {REFUSED}
[ -d "$d" ] || mkdir -p -- "$d" || exit {FAILED}
if [ -h "$p" ]; then
    p=$(readlink -f -- "$p") || exit {DANGLING}
    d=${{p%/*}}/
fi
if [ "$2" = append ]; then
    cat >> "$p" && wc -c < "$p" || exit {FAILED}
elif [ -w "$d" ]; then
    t=$d/.fireclaw.$3
    trap 'rm -f -- "$t"' EXIT
    cat > "$t" || exit {FAILED}
    if [ -e "$p" ]; then
        chmod "$(stat -c %a -- "$p")" "$t" || exit {FAILED}
    fi
    mv -f -- "$t" "$p" || exit {FAILED}
    trap - EXIT
elif [ -e "$p" ]; then
    cat > "$p" || exit {FAILED}
else
    exit {REFUSED}
fi
"""
)

# $2 depth, $3 entries. Writes a line for each: kind|size|'name', as stat(1) does.
LIST: Final = (
    _PATH
    + rf"""
if [ ! -e "$p" ]; then
    [ -h "$p" ] && exit {DANGLING}
    ls -A -- "$d" 2>/dev/null | head -n 40
    exit {MISSING}
fi
if [ ! -d "$p" ]; then exec stat -c '%F|%s|%N' -- "$p"; fi
[ -r "$p" ] && [ -x "$p" ] || exit {REFUSED}
cd -- "$p" || exit {REFUSED}
find . -mindepth 1 -maxdepth "$2" -exec stat -c '%F|%s|%N' -- {{}} + | head -n "$3"
"""
)

# $2 pattern, $3 names of files, $4 lines. Writes path:line:text. A pattern that is no regular expression is a text:
# grep says something about it, and nothing about an empty line.
SEARCH: Final = (
    _PATH
    + rf"""
[ -e "$p" ] || exit {MISSING}
how=-IE
[ -n "$(echo | grep -IE -e "$2" 2>&1)" ] && how=-IF
find -H "$p" -name .git -prune -o -type f -name "$3" -exec grep -Hn $how -e "$2" -- {{}} + | head -n "$4"
"""
)

# $1 name; the output is on stdin. Keeps the newest few.
KEEP_OUTPUT: Final = rf"""
umask 077
[ -d {DESK} ] || mkdir -p {DESK} || exit {FAILED}
cd {DESK} && cat > "$1" || exit {FAILED}
set -- output-*
[ $# -le {KEPT_OUTPUTS} ] && exit
ls -t | grep '^output-' | tail -n +{KEPT_OUTPUTS + 1} | while read -r old; do rm -f -- "$old"; done
"""

# $1 the command. Writes the handle. The command gets a session of its own, so nothing that ends this script ends it.
START_JOB: Final = rf"""
umask 077
[ -d {DESK} ] || mkdir -p {DESK} || exit {FAILED}
n=1
while [ -e {DESK}/job-$n ] || ! mkdir {DESK}/job-$n; do
    n=$((n + 1))
    [ $n -lt 1000 ] || exit {FAILED}
done
setsid sh -c '
    echo $$ > "$1/pid"
    sh -c "$2" > "$1/output" 2>&1 < /dev/null
    echo $? > "$1/status.new"
    mv "$1/status.new" "$1/status"
' sh {DESK}/job-$n "$1" > /dev/null 2>&1 < /dev/null &
until [ -s {DESK}/job-$n/pid ]; do sleep 0.05 2>/dev/null || sleep 1; done
echo job-$n
"""

# $1 handle, $2 seconds to wait, $3 "cancel" or "look", $4 bytes. Writes how it stands, the output's size, its end.
# dash takes no "--" in kill.
CHECK_JOB: Final = rf"""
j={DESK}/$1
if [ ! -s "$j/pid" ]; then
    ls {DESK} 2>/dev/null | grep '^job-'
    exit {MISSING}
fi
read -r pid < "$j/pid"
lives() {{ [ ! -e "$j/status" ] && kill -0 "$pid" 2>/dev/null; }}
n=0
while [ $n -lt "$2" ] && lives; do sleep 1; n=$((n + 1)); done
if [ "$3" = cancel ] && lives; then
    kill -TERM "-$pid"
    n=0
    while [ $n -lt 20 ] && kill -0 "-$pid" 2>/dev/null; do sleep 0.1 2>/dev/null || sleep 1; n=$((n + 1)); done
    kill -KILL "-$pid" 2>/dev/null
    echo cancelled > "$j/status"
fi
state=lost
lives && state=running
[ -e "$j/status" ] && read -r state < "$j/status"
echo "$state"
wc -c < "$j/output" 2>/dev/null || echo 0
tail -c "$4" "$j/output" 2>/dev/null
"""
