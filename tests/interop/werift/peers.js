// Two werift peers, relayed candidates only, that send numbered messages to each other over a data channel.
//
// usage: peers.js '{"host": …, "port": …, "transport": "udp"|"tcp"|"tls", "username": …, "password": …, "messages": N}'
//
// Prints one line of JSON: what each end received in order, and their relayed addresses. For TLS the authority is the one
// that Node's NODE_EXTRA_CA_CERTS names.
'use strict';
const { RTCPeerConnection } = require('werift');

const order = JSON.parse(process.argv[2]);
const url = order.transport === 'tls' ? `turns:${order.host}:${order.port}?transport=tcp`
  : `turn:${order.host}:${order.port}?transport=${order.transport}`;

function peer() {
  return new RTCPeerConnection({
    iceServers: [{ urls: url, username: order.username, credential: order.password }],
    iceTransportPolicy: 'relay',
  });
}

function fail(error) {
  console.error(error);
  process.exit(1);
}

// Relayed addresses in a session description, and the types of all its candidates.
function candidates(description) {
  const lines = description.sdp.split('\r\n').filter(line => line.startsWith('a=candidate:'));
  const fields = lines.map(line => line.split(' '));
  return { relayed: fields.map(f => `${f[4]}:${f[5]}`), types: fields.map(f => f[7]) };
}

// Counts messages that come in order until all are there.
function receive(channel) {
  let received = 0;
  return new Promise(done => channel.onMessage.subscribe(data => {
    if (data.readUInt32BE(0) !== received || data.length !== 4 + received % 1000) {
      fail(`message ${received} is ${data.subarray(0, 4).toString('hex')} of ${data.length} bytes`);
    }
    received += 1;
    if (received === order.messages) done(received);
  }));
}

function send(channel) {
  for (let number = 0; number < order.messages; number += 1) {
    const data = Buffer.alloc(4 + number % 1000);
    data.writeUInt32BE(number);
    channel.send(data);
  }
}

async function main() {
  const [alice, bob] = [peer(), peer()];
  const channel = alice.createDataChannel('numbers');
  const other = new Promise(done => bob.onDataChannel.subscribe(done));
  // Without trickling: a description is complete when it is set.
  await alice.setLocalDescription(await alice.createOffer());
  await bob.setRemoteDescription(alice.localDescription);
  await bob.setLocalDescription(await bob.createAnswer());
  await alice.setRemoteDescription(bob.localDescription);
  const back = await other;
  const arrived = [receive(back), receive(channel)];
  if (channel.readyState !== 'open') await channel.stateChanged.watch(state => state === 'open');
  send(channel);
  send(back);
  const received = await Promise.all(arrived);
  const [a, b] = [candidates(alice.localDescription), candidates(bob.localDescription)];
  console.log(JSON.stringify({
    received,
    relayed: [a.relayed, b.relayed],
    others: [...a.types, ...b.types].filter(type => type !== 'relay'),
  }));
  await Promise.all([alice.close(), bob.close()]);
  process.exit(0);
}

setTimeout(() => fail('not done within 40 s'), 40_000).unref();
main().catch(fail);
