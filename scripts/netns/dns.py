#!/usr/bin/env python3
"""Asks questions of DNS, and answers them in ways that a resolver has to cope with.

  dns.py ask SERVER NAME TYPE [tcp] [plain]      prints how it went, and the answers in order, in one line;
                                           with `plain` the question has no EDNS
  dns.py http URL NAME TYPE ADDRESS        the same by DNS over HTTP, from this address; or the status
  dns.py flood SERVER COUNT SUFFIX         asks so many different names at once; prints how many were answered
  dns.py serve ADDRESS KIND [LOG]          answers A for any name with 198.51.100.N, N the length of the name, and
                                           TXT with what is asked; names below `none.` do not exist. KIND:
      plain
      tcp       by TCP alone, the port of UDP is closed
      short     by UDP only that there is more than fits
      liar      by UDP wrong answers first: another number, another name, from another port
      slow      after ten seconds
      failing   SERVFAIL
                                           With LOG a line for each question: NAME TYPE ID-EDNS-FLAGS
"""
import http.client
import socket
import struct
import sys
import threading
import time

TYPES = {"A": 1, "NS": 2, "SOA": 6, "PTR": 12, "MX": 15, "TXT": 16, "AAAA": 28, "TYPE65": 65, "ANY": 255}
CODES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}


def pack_name(name):
    labels = [label for label in name.rstrip(".").split(".") if label]
    return b"".join(bytes([len(l)]) + l.encode() for l in labels) + b"\0"


def read_name(message, at):
    labels, end = [], None
    while True:
        length = message[at]
        if length >= 0xC0:
            end = end or at + 2
            at = (length & 0x3F) << 8 | message[at + 1]
        elif length:
            labels.append(message[at + 1 : at + 1 + length].decode())
            at += 1 + length
        else:
            return ".".join(labels) + ".", end or at + 1


def question(name, kind, number, edns=True):
    extra = b"\0" + struct.pack("!HHIH", 41, 1232, 0x8000, 0) if edns else b""
    head = struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, int(edns))
    return head + pack_name(name) + struct.pack("!HH", TYPES[kind], 1) + extra


def tell(message):
    """How it went and what the answers are."""
    _, flags, questions, answers, _, _ = struct.unpack("!HHHHHH", message[:12])
    at, found = 12, []
    for _ in range(questions):
        _, at = read_name(message, at)
        at += 4
    for _ in range(answers):
        _, at = read_name(message, at)
        kind, _, _, length = struct.unpack("!HHIH", message[at : at + 10])
        at += 10
        data = message[at : at + length]
        if kind == 1:
            found.append(socket.inet_ntop(socket.AF_INET, data))
        elif kind == 28:
            found.append(socket.inet_ntop(socket.AF_INET6, data))
        elif kind in (2, 5, 12):
            found.append(read_name(message, at)[0].lower())
        else:
            found.append(f"{kind}:{data.hex()[:80]}")
        at += length
    shortened = ["TC"] if flags & 0x0200 else []
    return " ".join([CODES.get(flags & 15, str(flags & 15))] + shortened + sorted(found))


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def ask(server, message, tcp=False, limit=8):
    if tcp:
        with socket.create_connection((server, 53), limit) as stream:
            stream.sendall(struct.pack("!H", len(message)) + message)
            return read_framed(stream)
    with socket.socket(family(server), socket.SOCK_DGRAM) as sock:
        sock.settimeout(limit)
        sock.connect((server, 53))
        sock.send(message)
        return sock.recv(65535)


def read_framed(stream):
    def exactly(count):
        data = b""
        while len(data) < count:
            more = stream.recv(count - len(data))
            if not more:
                raise OSError("closed")
            data += more
        return data

    return exactly(struct.unpack("!H", exactly(2))[0])


def by_http(url, name, kind, source):
    host, path = url.removeprefix("http://").split("/", 1)
    where, port = host.rsplit(":", 1)
    connection = http.client.HTTPConnection(where.strip("[]"), int(port), timeout=8, source_address=(source, 0))
    headers = {"Content-Type": "application/dns-message", "Host": host}
    connection.request("POST", "/" + path, question(name, kind, 0), headers)
    answer = connection.getresponse()
    body = answer.read()
    return tell(body) if answer.status == 200 else str(answer.status)


def flood(server, count, suffix):
    sock = socket.socket(family(server), socket.SOCK_DGRAM)
    # SO_RCVBUFFORCE: the answers may all come at once.
    sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)
    sock.connect((server, 53))
    sock.settimeout(8)
    began = time.monotonic()
    for number in range(count):
        sock.send(question(f"n{number}.{suffix}", "A", number))
        if number % 20 == 0:
            time.sleep(0.005)
    results = {}
    try:
        while sum(results.values()) < count and time.monotonic() - began < 8:
            code = tell(sock.recv(65535)).split()[0]
            results[code] = results.get(code, 0) + 1
    except OSError:
        pass
    return " ".join(f"{code}:{results[code]}" for code in sorted(results))


def answer(message, kind, log):
    """The answer to a question, or nothing."""
    name, at = read_name(message, 12)
    asked, _ = struct.unpack("!HH", message[at : at + 4])
    end = at + 4
    edns = struct.unpack("!H", message[10:12])[0]
    if log:
        flags = struct.unpack("!H", message[2:4])[0]
        print(name, asked, f"edns={edns} flags={flags:04x}", file=log, flush=True)
    code, records = 0, b""
    if kind == "failing":
        code = 2
    elif ".none." in "." + name:
        code = 3
    elif asked == 1:
        records = b"\xc0\x0c" + struct.pack("!HHIH4B", 1, 1, 5, 4, 198, 51, 100, len(name))
    elif asked == 16:
        text = (name * 250)[:250].encode()
        one = b"\xc0\x0c" + struct.pack("!HHIHB", 16, 1, 5, 251, 250) + text
        records = one * (200 if name.startswith("long.") else 1)
    count = 200 if name.startswith("long.") and records and asked == 16 else int(bool(records))
    head = message[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, count, 0, 0)
    return head + message[12:end] + records


def serve(address, kind, log):
    where = (address, 53)
    tcp = socket.create_server(where, family=family(address))

    def by_tcp():
        while True:
            stream, _ = tcp.accept()
            threading.Thread(target=one_stream, args=(stream,), daemon=True).start()

    def one_stream(stream):
        try:
            while True:
                message = read_framed(stream)
                if kind == "slow":
                    time.sleep(10)
                whole = answer(message, kind, log)
                stream.sendall(struct.pack("!H", len(whole)) + whole)
        except OSError:
            stream.close()

    if kind == "tcp":
        by_tcp()
    threading.Thread(target=by_tcp, daemon=True).start()
    udp = socket.socket(family(address), socket.SOCK_DGRAM)
    udp.bind(where)
    other = socket.socket(family(address), socket.SOCK_DGRAM)
    other.bind((address, 0))
    while True:
        message, asker = udp.recvfrom(65535)
        whole = answer(message, kind, log)
        if kind == "slow":
            threading.Timer(10, udp.sendto, (whole, asker)).start()
            continue
        if kind == "liar":
            lie = answer(message[:12] + pack_name("lie.example") + struct.pack("!HH", 1, 1), "plain", None)
            number = struct.unpack("!H", message[:2])[0] ^ 1
            udp.sendto(lie, asker)
            udp.sendto(struct.pack("!H", number) + whole[2:], asker)
            udp.sendto(b"\0", asker)
            other.sendto(whole[:-1] + b"\1", asker)
            time.sleep(0.1)
        if kind == "short" or len(whole) > 1232:
            end = read_name(message, 12)[1] + 4
            whole = message[:2] + struct.pack("!HHHHH", 0x8380, 1, 0, 0, 0) + message[12:end]
        udp.sendto(whole, asker)


def main(words):
    if words[0] == "ask":
        server, name, kind, *how = words[1:]
        print(tell(ask(server, question(name, kind, 4711, "plain" not in how), "tcp" in how)))
    elif words[0] == "http":
        print(by_http(*words[1:]))
    elif words[0] == "flood":
        print(flood(words[1], int(words[2]), words[3]))
    elif words[0] == "serve":
        serve(words[1], words[2], open(words[3], "a") if len(words) > 3 else None)


main(sys.argv[1:])
