"""Echoes what comes to port 7100 by TCP and UDP, of both families; with a name server at port 53
if "dns" is said."""
import _thread
import socket
import sys


def echo(connection):
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)


def datagrams(port, answer):
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::", port))
    while True:
        data, peer = server.recvfrom(65536)
        server.sendto(answer(data), peer)


def name(query):
    """service.tests is 10.99.0.7 and fd99::7."""
    end = query.index(0, 12) + 1
    kind = query[end : end + 2]
    found = query[12:end] == b"\x07service\x05tests\x00"
    address = {
        b"\x00\x01": socket.inet_pton(socket.AF_INET, "10.99.0.7"),
        b"\x00\x1c": socket.inet_pton(socket.AF_INET6, "fd99::7"),
    }.get(kind)
    answers = bytes([0, 1 if found and address else 0])
    flags = b"\x81\x80" if found else b"\x81\x83"
    reply = query[:2] + flags + b"\x00\x01" + answers + b"\x00\x00\x00\x00" + query[12 : end + 4]
    if found and address:
        reply += b"\xc0\x0c" + kind + b"\x00\x01\x00\x00\x00\x3c"
        reply += len(address).to_bytes(2) + address
    return reply


server = socket.create_server(("::", 7100), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
_thread.start_new_thread(datagrams, (7100, bytes))
if "dns" in sys.argv:
    _thread.start_new_thread(datagrams, (53, name))
print("ready", flush=True)
while True:
    _thread.start_new_thread(echo, (server.accept()[0],))
