"""Is a port free, and if not, who has it?"""

from __future__ import annotations

import socket


def check_port(host: str, port: int) -> None:
    """Raises SystemExit when something listens there already."""
    if _is_free(host, port):
        return
    free = next((p for p in range(port + 1, min(port + 100, 65536)) if _is_free(host, p)), None)
    advice = "" if free is None else f"; port {free} is free: --port {free}"
    raise SystemExit(f"port {port} of {host} is taken{_by_whom(port)}{advice}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _by_whom(port: int) -> str:
    import psutil

    try:
        for connection in psutil.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:  # another user's process
        pass
    return ""
