"""Two aioice agents, relayed candidates only, that send numbered messages to each other.

usage: peers.py '{"host": …, "port": …, "transport": "udp"|"tcp"|"tls", "username": …, "password": …, "messages": N}'

Prints one line of JSON: what each end received in order, and between which addresses. For TLS the authority is the one
that OpenSSL's SSL_CERT_FILE names.
"""

import asyncio
import json
import sys

import aioice


def agent(order, controlling):
    return aioice.Connection(
        ice_controlling=controlling,
        turn_server=(order["host"], order["port"]),
        turn_username=order["username"],
        turn_password=order["password"],
        turn_ssl=order["transport"] == "tls",
        turn_transport="udp" if order["transport"] == "udp" else "tcp",
        transport_policy=aioice.TransportPolicy.RELAY,
        use_ipv6=False,
    )


async def introduce(one, other):
    """What signalling does: tells `other` of `one`."""
    for candidate in one.local_candidates:
        await other.add_remote_candidate(candidate)
    await other.add_remote_candidate(None)
    other.remote_username = one.local_username
    other.remote_password = one.local_password


async def exchange(one, other, messages):
    """Sends numbered messages from `one` to `other`; answers how many came in order."""
    received = 0
    for number in range(messages):
        await one.send(number.to_bytes(4, "big") + bytes(number % 1000))
        data = await asyncio.wait_for(other.recv(), 5)
        if int.from_bytes(data[:4], "big") != number or len(data) != 4 + number % 1000:
            raise ValueError(f"message {number} is {data[:4].hex()} of {len(data)} bytes")
        received += 1
    return received


async def main():
    order = json.loads(sys.argv[1])
    alice, bob = agent(order, True), agent(order, False)
    try:
        await asyncio.gather(alice.gather_candidates(), bob.gather_candidates())
        await introduce(alice, bob)
        await introduce(bob, alice)
        await asyncio.wait_for(asyncio.gather(alice.connect(), bob.connect()), 20)
        to_bob, to_alice = await asyncio.gather(
            exchange(alice, bob, order["messages"]), exchange(bob, alice, order["messages"])
        )
        relayed = [[f"{c.host}:{c.port}" for c in a.local_candidates if c.type == "relay"] for a in (alice, bob)]
        others = [c.type for a in (alice, bob) for c in a.local_candidates if c.type != "relay"]
        print(json.dumps({"received": [to_bob, to_alice], "relayed": relayed, "others": others}))
    finally:
        await asyncio.gather(alice.close(), bob.close())


asyncio.run(main())
