"""ask.py BYTES ADDRESS[@PORT]...: sends so many bytes by TCP, and datagrams, to the echo of each
address, and checks what comes back."""
import _thread
import socket
import sys

SIZES = (1, 100, 1300, 8000)


def send(stream, data):
    stream.sendall(data)
    stream.shutdown(socket.SHUT_WR)


def connected(address, port, kind):
    stream = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    stream.settimeout(60 if kind == socket.SOCK_STREAM else 10)
    stream.connect((address, port))
    return stream


def tcp(address, port, data):
    with connected(address, port, socket.SOCK_STREAM) as stream:
        _thread.start_new_thread(send, (stream, data))
        echoed = bytearray()
        while part := stream.recv(65536):
            echoed += part
    if echoed != data:
        sys.exit(f"{address} {port} tcp: {len(echoed)} of {len(data)} bytes, or others")


def udp(address, port):
    with connected(address, port, socket.SOCK_DGRAM) as stream:
        for size in SIZES:
            data = bytes(n * 7 % 251 for n in range(size))
            for attempt in range(3):
                try:
                    stream.send(data)
                    if stream.recv(65536) == data:
                        break
                except TimeoutError:
                    pass
            else:
                sys.exit(f"{address} {port} udp: no datagram of {size} bytes comes back")


pattern = bytes(n * n % 251 for n in range(10007))
count = int(sys.argv[1])
data = (pattern * (count // len(pattern) + 1))[:count]
for target in sys.argv[2:]:
    address, _, port = target.partition("@")
    port = int(port or 7100)
    try:
        tcp(address, port, data)
        udp(address, port)
    except OSError as error:
        sys.exit(f"{address} {port}: {error}")
    print(target)
