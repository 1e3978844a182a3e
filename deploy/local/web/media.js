// Camera and microphone, or a test picture with a quiet tone where there is none.

const WIDTH = 640;
const HEIGHT = 400;
const FRAMES_PER_SECOND = 20;

const REASONS = {
  NotAllowedError: "The browser was told not to give this page the camera. A test picture is sent instead.",
  NotFoundError: "This machine has no camera or microphone. A test picture is sent instead.",
  NotReadableError: "Another program has the camera. A test picture is sent instead.",
  OverconstrainedError: "The camera cannot deliver a usable picture. A test picture is sent instead.",
};

/** `{ stream, note, isTest }`; never fails: without a camera there is the test picture and a note that says why. */
export const openMedia = async (wantTest) => {
  if (wantTest) return { stream: testStream(), note: "", isTest: true };
  if (!navigator.mediaDevices?.getUserMedia) {
    const note = "Browsers give the camera to https pages and to localhost only: start the cluster with --https. A test picture is sent instead.";
    return { stream: testStream(), note, isTest: true };
  }
  const video = { width: { ideal: 1280 }, height: { ideal: 720 }, frameRate: { ideal: 30 } };
  try {
    return { stream: await navigator.mediaDevices.getUserMedia({ audio: true, video }), note: "", isTest: false };
  } catch (error) {
    return withoutSomething(error, video);
  }
};

/** One device missing does not cost the other one. */
const withoutSomething = async (error, video) => {
  if (error.name === "NotFoundError") {
    for (const [kinds, note] of [[{ video }, "No microphone was found: the others will see you but not hear you."], [{ audio: true }, "No camera was found: a test picture is sent instead of it."]]) {
      try {
        const stream = await navigator.mediaDevices.getUserMedia(kinds);
        if (!kinds.video) testStream().getVideoTracks().forEach((track) => stream.addTrack(track));
        return { stream, note, isTest: !kinds.video };
      } catch {
        // Then the next one.
      }
    }
  }
  return { stream: testStream(), note: REASONS[error.name] ?? `The camera cannot be used (${error.message}). A test picture is sent instead.`, isTest: true };
};

/** A moving clock, so that a frozen picture is seen to be one, and a quiet tone. */
export const testStream = () => {
  const canvas = Object.assign(document.createElement("canvas"), { width: WIDTH, height: HEIGHT });
  const context = canvas.getContext("2d");
  const hue = Math.floor(Math.random() * 360);
  const draw = () => {
    const now = new Date();
    const turn = (now.getTime() % 4000) / 4000;
    const sky = context.createLinearGradient(0, 0, WIDTH, HEIGHT);
    sky.addColorStop(0, `hsl(${hue} 45% 26%)`);
    sky.addColorStop(1, `hsl(${(hue + 60) % 360} 50% 14%)`);
    context.fillStyle = sky;
    context.fillRect(0, 0, WIDTH, HEIGHT);
    context.fillStyle = `hsl(${hue} 75% 78%)`;
    context.beginPath();
    context.arc(WIDTH / 2 + Math.cos(turn * 2 * Math.PI) * 150, HEIGHT * 0.4 + Math.sin(turn * 4 * Math.PI) * 70, 26, 0, 2 * Math.PI);
    context.fill();
    context.fillStyle = "#fff";
    context.textAlign = "center";
    context.font = "600 54px system-ui, sans-serif";
    context.fillText(`${now.toLocaleTimeString("en-GB")}.${Math.floor(now.getMilliseconds() / 100)}`, WIDTH / 2, HEIGHT * 0.42);
    context.font = "22px system-ui, sans-serif";
    context.fillText("test picture", WIDTH / 2, HEIGHT * 0.42 + 36);
  };
  draw();
  const timer = setInterval(draw, 1000 / FRAMES_PER_SECOND);
  const stream = canvas.captureStream(FRAMES_PER_SECOND);
  const [picture] = stream.getVideoTracks();
  const sound = new AudioContext();
  const tone = new OscillatorNode(sound, { frequency: 220 + (hue % 220) });
  const volume = new GainNode(sound, { gain: 0.03 });
  const out = sound.createMediaStreamDestination();
  tone.connect(volume).connect(out);
  tone.start();
  stream.addTrack(out.stream.getAudioTracks()[0]);
  // A track that is stopped by its user ends what feeds it.
  const stop = picture.stop.bind(picture);
  picture.stop = () => {
    stop();
    clearInterval(timer);
    sound.close();
  };
  return stream;
};
