"""Single packets that no common tool sends or tells of, for the rows about filters.

  probe.py raw PROTOCOL ADDRESS HEX          sends an IP packet of this protocol, twice a second, for 10 s
  probe.py hears PROTOCOL FROM               waits 5 s for an IP packet of this protocol from there
  probe.py stream ADDRESS PORT STOP_FILE     a datagram of one UDP flow every 20 ms until the file is there
  probe.py arrivals PORT FILE                sends each back, and writes when it arrived, in ms since 1970
  probe.py refused ADDRESS PORT              does a datagram there come back as "port unreachable"?
  probe.py path_mtu ADDRESS PORT BYTES       prints what the path says it carries when so many are too many
"""

import os
import socket
import sys
import time


def udp(to=None):
    found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if to:
        found.connect((to[0], int(to[1])))
    return found


def raw(protocol, address, payload):
    out = socket.socket(socket.AF_INET, socket.SOCK_RAW, int(protocol))
    for _ in range(20):
        out.sendto(bytes.fromhex(payload), (address, 0))
        time.sleep(0.5)


def hears(protocol, source):
    heard = socket.socket(socket.AF_INET, socket.SOCK_RAW, int(protocol))
    until = time.monotonic() + 5
    while time.monotonic() < until:
        heard.settimeout(max(until - time.monotonic(), 0.01))
        try:
            if heard.recvfrom(2048)[1][0] == source:
                return
        except TimeoutError:
            pass
    sys.exit("nothing came")


def stream(address, port, stop):
    out = udp((address, port))
    while not os.path.exists(stop):
        try:
            out.send(b"stream")
        except OSError:
            pass
        time.sleep(0.02)


def arrivals(port, path):
    bound = udp()
    bound.bind(("0.0.0.0", int(port)))
    with open(path, "w") as out:
        while True:
            data, source = bound.recvfrom(2048)
            bound.sendto(data, source)
            print(round(time.time() * 1000), file=out, flush=True)


def refused(address, port):
    out = udp((address, port))
    out.settimeout(0.5)
    for _ in range(10):
        try:
            out.send(b"anybody?")
            out.recv(2048)
        except ConnectionRefusedError:
            return
        except TimeoutError:
            pass
    sys.exit("no word of it")


def path_mtu(address, port, count):
    IP_MTU_DISCOVER, IP_PMTUDISC_DO, IP_MTU = 10, 2, 14
    out = udp((address, port))
    out.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
    for _ in range(20):
        try:
            out.send(bytes(int(count)))
        except OSError:
            print(out.getsockopt(socket.IPPROTO_IP, IP_MTU))
            return
        time.sleep(0.25)
    sys.exit("everything is said to fit")


globals()[sys.argv[1]](*sys.argv[2:])
