# shellcheck shell=sh
# Enroot, and so Pyxis, starts programs from a login shell, in which Debian's /etc/profile sets PATH anew and then reads this.
PATH=/opt/safework/.venv/bin:$PATH
export PATH
