// The page at work: photos are sent, events move what is shown, and nothing needs a reload. All that is shown comes from
// the server as HTML; this file only puts it in place. Addresses are relative to the page's own.

const WORDS = JSON.parse(document.body.dataset.words);
const SIGN_IN = document.body.dataset.signIn; // absent where there is no key
const LANGUAGE = document.documentElement.lang;

const SUMMARY_EVERY_MS = 5000;
const AT_LEAST_APART_MS = 1000; // between two requests for the same part of the page
const UPLOADS_AT_ONCE = 2; // browsers have six connections to a server; events and clips need some
const CARDS_AT_ONCE = 3;
const STALLED_MS = 120_000; // an upload of which nothing moves for so long has lost its connection
const MAX_SERVER_ERRORS = 5;
const LAST_RETRY_MS = 15_000;
const HIDDEN_MS = 300_000; // a page that nobody has looked at for so long hears no events
const MAX_FILES = 2000; // of a folder

const byId = (id) => document.getElementById(id);
const cardOf = (id) => byId(`task-${id}`);
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// ------------------------------------------------------------------ words, as words.py writes them

const say = (key, values = {}) => WORDS[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
const number = (n) => new Intl.NumberFormat("en-US").format(n);
const count = (key, n) => say(`${key}.${n === 1 ? "one" : "other"}`, { n: number(n) });
const stageName = (stage) => WORDS[`stage.${stage}`] ?? stage;

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return say("time.seconds", { s: whole });
  if (whole < 3600) {
    const [m, s] = [Math.floor(whole / 60), whole % 60];
    return m < 10 && s ? say("time.minutes_seconds", { m, s }) : say("time.minutes", { m });
  }
  const minutes = Math.floor(whole / 60);
  if (whole < 86_400) {
    const [h, m] = [Math.floor(minutes / 60), minutes % 60];
    return m ? say("time.hours_minutes", { h, m }) : say("time.hours", { h });
  }
  const [d, h] = [Math.floor(whole / 86_400), Math.floor((whole % 86_400) / 3600)];
  return h ? say("time.days_hours", { d: number(d), h }) : say("time.days", { d: number(d) });
}

function leftText(seconds) {
  if (seconds === undefined || seconds === null) return WORDS["clip.unknown"];
  return seconds >= 1 ? say("clip.left", { time: duration(seconds) }) : WORDS["clip.soon"];
}

const clock = new Intl.DateTimeFormat(LANGUAGE, { dateStyle: "medium", timeStyle: "short" });
const seenAt = new WeakMap(); // element with an age → when it came, by this browser's own clock

// Durations that grow, and times of day where the reader is.
function tick(root = document) {
  for (const element of root.querySelectorAll("[data-age-s]")) {
    const now = performance.now();
    if (!seenAt.has(element)) seenAt.set(element, now);
    const time = duration(Number(element.dataset.ageS) + (now - seenAt.get(element)) / 1000);
    const text = element.dataset.text ? say(element.dataset.text, { time }) : time;
    if (element.textContent !== text) element.textContent = text;
  }
  for (const element of root.querySelectorAll("time[datetime]:not([data-local])")) {
    element.textContent = clock.format(new Date(element.dateTime));
    element.dataset.local = "";
  }
}

// What screen readers hear of changes that nobody asked for: the last few, now and then.
const unsaid = [];
function announce(text) {
  if (unsaid.push(text) === 1) {
    setTimeout(() => {
      byId("said").textContent = unsaid.splice(0).slice(-3).join(". ");
    }, 1500);
  }
}

let toastTimer;
function toast(text) {
  const box = byId("toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (box.hidden = true), 8000);
}

// ------------------------------------------------------------------ asking the server

class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

// The answer's text. Throws Refused, also where there is no answer. Signed out: on to signing in, unless photos
// or a prompt would be lost with the page.
async function ask(address, method = "GET") {
  const unanswered = () => {
    throw new Refused(0, WORDS["action.no_answer"]);
  };
  const asked = { method, headers: { "x-fragment": "1" }, redirect: "manual", cache: "no-store" };
  const answer = await fetch(address, asked).catch(unanswered);
  if (SIGN_IN && (answer.type === "opaqueredirect" || answer.status === 401)) {
    if (uploads.length === 0 && byId("prompt").value === byId("prompt").defaultValue) location.assign(SIGN_IN);
    throw new Refused(401, say("upload.signed_out"));
  }
  const text = await answer.text().catch(unanswered);
  if (!answer.ok) throw new Refused(answer.status, text);
  return text;
}

const query = () => new URLSearchParams(location.search);
function partial(address, more = []) {
  const asked = query();
  asked.set("lang", LANGUAGE);
  for (const [name, value] of more) asked.append(name, value);
  return `${address}?${asked}`;
}

function parsed(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  tick(template.content);
  return template.content;
}

// Runs `work` soon, never twice at a time, and again where it was asked for meanwhile.
function throttled(work) {
  let [isRunning, isAsked, lastAt] = [false, false, -Infinity];
  return async function run() {
    isAsked = true;
    if (isRunning) return;
    isRunning = true;
    try {
      while (isAsked) {
        await pause(Math.max(30, lastAt + AT_LEAST_APART_MS - performance.now()));
        isAsked = false;
        lastAt = performance.now();
        try {
          await work();
        } catch (error) {
          if (!(error instanceof Refused)) throw error;
          // No answer now: the next event, the next tick, or the connection that comes back asks again.
        }
      }
    } finally {
      isRunning = false;
    }
  };
}

// ------------------------------------------------------------------ cards

const fetchedAt = new WeakMap(); // card → when the request for it was sent; pages of the list are as old as theirs
const deleted = new Set();

function moveProgress(card, percent, stage, left) {
  const shown = Math.max(Number(card.dataset.percent), percent);
  card.dataset.percent = shown;
  const bar = card.querySelector("progress");
  if (!bar) return;
  bar.value = shown;
  card.querySelector(".percent").textContent = `${shown}%`;
  if (stage !== undefined) card.querySelector(".stage").textContent = stage;
  card.querySelector(".eta").textContent = left;
}

// The card that is to stand there: the old one where nothing but its progress changed, so that its clip plays on.
function kept(old, fresh, askedAt) {
  if (!old) return fresh;
  if (askedAt < (fetchedAt.get(old) ?? -Infinity)) return old;
  if (old.dataset.version !== fresh.dataset.version) return fresh;
  if (fresh.dataset.status === "processing") {
    moveProgress(
      old,
      Number(fresh.dataset.percent),
      fresh.querySelector(".stage").textContent,
      fresh.querySelector(".eta").textContent,
    );
    old.querySelector(".worker").textContent = fresh.querySelector(".worker").textContent;
  }
  return old;
}

function swap(old, fresh) {
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  old.replaceWith(fresh);
  if (!focused) return;
  const twin = focused.dataset.action && fresh.querySelector(`[data-action="${focused.dataset.action}"]`);
  (twin || fresh).focus({ preventScroll: true });
}

function removeCard(id) {
  deleted.add(id);
  const card = cardOf(id);
  if (!card) return;
  const next = card.nextElementSibling ?? card.previousElementSibling ?? byId("clips");
  const hadFocus = card.contains(document.activeElement);
  card.remove();
  if (hadFocus) next.focus({ preventScroll: true });
  refreshList();
}

function put(html, id, askedAt) {
  const fresh = parsed(html).querySelector(".task");
  const old = cardOf(id);
  const status = query().get("status");
  if (!old || (status && fresh.dataset.status !== status)) {
    refreshList();
    return;
  }
  const chosen = kept(old, fresh, askedAt);
  fetchedAt.set(chosen, askedAt);
  if (chosen !== old) swap(old, chosen);
}

const stale = new Set(); // ids of cards to fetch
let cardsUnderWay = 0;

async function refreshCard(id) {
  stale.add(id);
  if (cardsUnderWay >= CARDS_AT_ONCE) return;
  cardsUnderWay += 1;
  try {
    for (const next of stale) {
      stale.delete(next);
      const askedAt = performance.now();
      try {
        put(await ask(partial(`page/tasks/${encodeURIComponent(next)}`)), next, askedAt);
      } catch (error) {
        if (error.status === 404) removeCard(next);
        else if (!(error instanceof Refused)) throw error;
      }
    }
  } finally {
    cardsUnderWay -= 1;
  }
}

// ------------------------------------------------------------------ the list

// Makes `wanted` the children of `parent`, and touches none that is in its place already.
function place(parent, wanted) {
  const staying = new Set(wanted);
  for (const child of [...parent.children]) if (!staying.has(child)) child.remove();
  let cursor = parent.firstElementChild;
  for (const node of wanted) {
    if (node === cursor) cursor = cursor.nextElementSibling;
    else parent.insertBefore(node, cursor);
  }
}

function applyList(html, askedAt) {
  const list = byId("list");
  const olds = [...list.children];
  const used = new Set();
  const focused = document.activeElement?.closest?.("[data-action]");
  const focusedId = focused?.closest(".task")?.dataset.id;

  const wanted = [...parsed(html).firstElementChild.children].map((fresh) => {
    const cards = [...fresh.querySelectorAll(".task")].filter((card) => !deleted.has(card.dataset.id));
    if (!fresh.matches(".group")) return olds.find((old) => old.isEqualNode(fresh)) ?? fresh;
    const keptCards = cards.map((card) => kept(cardOf(card.dataset.id), card, askedAt));
    // A group is known by its id, single cards that stand together by any card that both have.
    const match = olds.find(
      (old) =>
        !used.has(old) &&
        old.matches(".group") &&
        old.dataset.group === fresh.dataset.group &&
        (fresh.dataset.group || keptCards.some((card) => old.contains(card))),
    );
    const section = match ?? fresh;
    used.add(section);
    if (match && fresh.dataset.group) applyHead(fresh.querySelector(".head"), match.querySelector(".head"));
    place(section.querySelector(".cards"), keptCards);
    return section;
  });
  place(list, wanted);
  if (focusedId && !document.contains(focused)) {
    const card = cardOf(focusedId);
    (card?.querySelector(`[data-action="${focused.dataset.action}"]`) ?? card ?? byId("clips")).focus({ preventScroll: true });
  }
}

const refreshList = throttled(async () => {
  const address = partial("page/list");
  const askedAt = performance.now();
  const html = await ask(address);
  if (address === partial("page/list")) applyList(html, askedAt); // else the reader has gone to another part meanwhile
});

// Whether a task would stand on the part of the list that is shown. Ids grow with time, and the list goes back in time.
function belongs(id, groupId, status) {
  const asked = query();
  if (asked.get("group") && groupId && asked.get("group") !== groupId) return false;
  if (asked.get("status") && asked.get("status") !== status) return false;
  if (asked.get("before") && id >= asked.get("before")) return false;
  const cards = document.querySelectorAll("#list .task");
  return !document.querySelector(".pages [rel=next]") || cards.length === 0 || id > cards[cards.length - 1].dataset.id;
}

// ------------------------------------------------------------------ the strip of numbers, and heads of groups

function applyHead(fresh, old) {
  if (old && fresh && !old.isEqualNode(fresh) && !old.contains(document.activeElement)) old.replaceWith(fresh);
}

const refreshSummary = throttled(async () => {
  const shown = [...document.querySelectorAll("#list [data-head]")].map((head) => ["head", head.dataset.head]);
  const fresh = parsed(await ask(partial("page/summary", shown)));
  for (const part of fresh.querySelectorAll("[data-part]")) {
    const old = document.querySelector(`#summary [data-part="${part.dataset.part}"]`);
    if (old.isEqualNode(part)) continue;
    for (const { name } of [...old.attributes]) if (!part.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of part.attributes) old.setAttribute(name, value);
    old.replaceChildren(...part.childNodes); // and not the part itself, which may have the focus
  }
  for (const head of fresh.querySelectorAll("[data-head]")) {
    applyHead(head, document.querySelector(`#list [data-head="${CSS.escape(head.dataset.head)}"]`));
  }
  document.title = fresh.querySelector("#summary").dataset.title;
});

// ------------------------------------------------------------------ events

function statusOf(event) {
  if (event.type === "completion") return "completed";
  if (event.type === "progress") return event.metadata?.status ?? event.status;
  const code = event.details?.error_code;
  return code === "deleted" || code === "cancelled" ? code : "failed";
}

function heard(event) {
  const id = event.task_name;
  const status = statusOf(event);
  if (status === "deleted") {
    if (cardOf(id)) removeCard(id);
    refreshSummary();
    return;
  }
  if (deleted.has(id)) return;
  const card = cardOf(id);
  const metadata = event.metadata ?? {};
  const { group_id: groupId } = event.metadata ?? event.details ?? event.result ?? {};
  if (!card) {
    if (belongs(id, groupId, status)) refreshList();
    if (event.type !== "progress" || status !== "processing") refreshSummary();
    return;
  }
  const isSameLease = metadata.lease === undefined || Number(card.dataset.lease) === metadata.lease;
  if (card.dataset.status === status && (status !== "processing" || isSameLease)) {
    if (status !== "processing") return;
    const stage = metadata.stage === undefined ? undefined : stageName(metadata.stage);
    moveProgress(card, event.progress_percent, stage, leftText(metadata.eta_s));
    if (metadata.cancel_requested && card.querySelector("[data-action=cancel]")) refreshCard(id); // by another tab, say
    return;
  }
  if (metadata.lease !== undefined && metadata.lease < Number(card.dataset.lease)) return; // of an earlier try
  if (WORDS[`said.${status}`]) announce(say(`said.${status}`, { name: card.dataset.name }));
  refreshCard(id);
  refreshSummary();
}

let source = null;
let [wasLost, retryMs] = [false, 1000];

function showConnection(state) {
  const sign = byId("connection");
  if (sign.dataset.state === state && !sign.hidden) return;
  sign.hidden = false;
  sign.dataset.state = state;
  sign.querySelector(".text").textContent = sign.dataset[state];
  byId("lost").hidden = state !== "lost";
}

function connect() {
  source?.close();
  const mine = (source = new EventSource("events/queue"));
  mine.onopen = () => {
    retryMs = 1000;
    showConnection("live");
    if (wasLost) {
      wasLost = false;
      refreshList();
      refreshSummary();
      reload();
    }
  };
  mine.onmessage = (message) => heard(JSON.parse(message.data));
  mine.onerror = () => {
    if (mine !== source) return;
    wasLost = true;
    showConnection("lost");
    if (mine.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
    ask(partial("page/summary")).catch(() => {}); // leads to signing in where that is the reason
    setTimeout(() => mine === source && connect(), retryMs);
    retryMs = Math.min(retryMs * 2, LAST_RETRY_MS);
  };
}

let hiddenTimer;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiddenTimer);
  if (document.hidden) {
    hiddenTimer = setTimeout(() => {
      source?.close();
      source = null;
    }, HIDDEN_MS);
    return;
  }
  if (!source) {
    wasLost = true; // what happened meanwhile was not heard
    connect();
  }
  refreshSummary();
});
addEventListener("pagehide", () => {
  source?.close();
  source = null;
});
addEventListener("pageshow", (event) => {
  if (event.persisted) {
    wasLost = true;
    connect();
  }
});

// ------------------------------------------------------------------ what a card's buttons do

async function confirmed(name) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = say("confirm.text", { name });
  dialog.returnValue = "keep";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "delete";
}

document.addEventListener("submit", async (event) => {
  const button = event.submitter;
  const verb = button?.dataset.action;
  if (!verb) return;
  event.preventDefault();
  const card = button.closest(".task");
  const { id, name } = card.dataset;
  if (button.getAttribute("aria-busy") || (verb === "delete" && !(await confirmed(name)))) return;
  button.setAttribute("aria-busy", "true");
  const askedAt = performance.now();
  try {
    const address = new URL(event.target.action);
    address.searchParams.set("lang", LANGUAGE);
    const html = await ask(address, "POST");
    if (verb === "delete") {
      announce(say("said.deleted", { name }));
      removeCard(id);
    } else put(html, id, askedAt);
  } catch (error) {
    toast(say("action.failed", { reason: error.message }));
    if (error.status === 404) removeCard(id);
    else if (error.status > 0) refreshCard(id); // it has ended meanwhile, say
  } finally {
    button.removeAttribute("aria-busy");
  }
  refreshSummary();
});

// ------------------------------------------------------------------ pictures and clips

// What could not be loaded leaves its frame empty, and is asked for again once the server is back.
document.addEventListener(
  "error",
  ({ target }) => {
    if (target.matches(".frame img")) target.dataset.broken = "";
  },
  true,
);

function reload() {
  for (const picture of document.querySelectorAll("img[data-broken]")) {
    delete picture.dataset.broken;
    picture.src = picture.getAttribute("src");
  }
  for (const video of document.querySelectorAll("video")) if (video.error) video.load();
}

// One clip at a time makes a sound.
document.addEventListener(
  "play",
  (event) => {
    for (const video of document.querySelectorAll("video")) if (video !== event.target) video.pause();
  },
  true,
);

// ------------------------------------------------------------------ going to another part of the list

async function show(address) {
  if (address !== undefined) history.pushState(null, "", address);
  for (const link of document.querySelectorAll(".filters a[data-status]")) {
    if (link.dataset.status === (query().get("status") ?? "")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  refreshSummary();
  const [wanted, askedAt] = [partial("page/list"), performance.now()];
  try {
    const html = await ask(wanted);
    if (wanted === partial("page/list")) applyList(html, askedAt);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    toast(say("action.failed", { reason: error.message }));
  }
}

document.addEventListener("click", async (event) => {
  const link = event.target.closest("a[data-go]");
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  const turnsPage = Boolean(link.closest("#list"));
  await show(link.href);
  if (turnsPage) byId("clips").focus({ preventScroll: true });
  if (turnsPage) byId("clips").scrollIntoView();
});
addEventListener("popstate", () => show());

// ------------------------------------------------------------------ photos on their way

const MAX_BYTES = Number(document.body.dataset.maxBytes);
const uploads = []; // {file, row, state, key, wishes, batch, groupSent, sent}
let sending = 0;

const uploadsUnderWay = () => uploads.some(({ state }) => ["waits", "sending", "checking", "again"].includes(state));

function setUpload(upload, state, note) {
  upload.state = state;
  upload.row.dataset.state = state;
  upload.row.querySelector(".note").textContent = note ?? WORDS[`upload.${state}`] ?? "";
  upload.row.querySelector("[data-upload=retry]").hidden = state !== "failed" || upload.cannot;
  upload.row.querySelector("[data-upload=remove]").hidden = !["ready", "failed"].includes(state);
}

function showChosen() {
  byId("uploads").hidden = uploads.length === 0;
  const ready = uploads.filter(({ state }) => state === "ready").length;
  byId("submit").textContent = ready ? count("form.submit", ready) : WORDS["form.submit.none"];
}

function drop(upload) {
  uploads.splice(uploads.indexOf(upload), 1);
  upload.row.remove();
  showChosen();
}

function add(files) {
  for (const file of files) {
    const same = ({ file: other, state }) =>
      state === "ready" && other.name === file.name && other.size === file.size && other.lastModified === file.lastModified;
    if (uploads.some(same)) continue;
    const row = byId("upload-row").content.firstElementChild.cloneNode(true);
    row.querySelector(".name").textContent = row.querySelector(".name").title = file.name.normalize("NFC");
    row.querySelector("progress").setAttribute("aria-label", say("upload.progress", { name: file.name }));
    row.querySelector("[data-upload=remove]").setAttribute("aria-label", say("upload.remove", { name: file.name }));
    const upload = { file, row, cannot: false };
    if (file.size > MAX_BYTES || file.size === 0) {
      upload.cannot = true;
      const reason = file.size ? say("upload.too_large", { size: document.body.dataset.maxSize }) : WORDS["upload.empty"];
      setUpload(upload, "failed", reason);
    } else setUpload(upload, "ready");
    uploads.push(upload);
    byId("uploads").append(row);
  }
  byId("composer-error").hidden = true;
  showChosen();
}

// Where the page is not served over https, browsers have no crypto.randomUUID.
const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

// All photos of one drop form one new group. The first of them makes it; the others wait to hear its id.
function pump() {
  for (const upload of uploads) {
    if (sending >= UPLOADS_AT_ONCE) return;
    const { batch } = upload;
    if (upload.state !== "waits" || (batch.group === null && batch.leader !== null)) continue;
    if (batch.group === null) batch.leader = upload;
    upload.groupSent = batch.group;
    sending += 1;
    send(upload).finally(() => {
      sending -= 1;
      if (batch.leader === upload) batch.leader = null;
      pump();
    });
  }
}

// Sends until there is an answer: nothing is lost with a lost connection, since the key makes repeating harmless.
async function send(upload) {
  let serverErrors = 0;
  for (let waitMs = 1000; ; waitMs = Math.min(waitMs * 2, LAST_RETRY_MS)) {
    setUpload(upload, "sending");
    const { status, answer } = await post(upload);
    if (status === 201 || status === 200) {
      upload.batch.group ??= answer.data.group_id;
      upload.batch.added += 1;
      upload.row.querySelector("progress").value = 100;
      setUpload(upload, "sent");
      setTimeout(() => drop(upload), 1200);
      refreshList();
      refreshSummary();
      if (!uploadsUnderWay()) announce(count("said.added", upload.batch.added));
      return;
    }
    if (status >= 500) serverErrors += 1;
    const mayPass = status === 0 || status === 408 || status === 429 || (status >= 500 && serverErrors < MAX_SERVER_ERRORS);
    if (!mayPass) {
      setUpload(upload, "failed", reasonOf(status, answer));
      if (status < 500) upload.key = newKey(); // it was refused for good, so another try is another request
      return;
    }
    try {
      await upload.file.slice(0, 1).arrayBuffer();
    } catch {
      upload.cannot = true;
      setUpload(upload, "failed", WORDS["upload.unreadable"]);
      return;
    }
    setUpload(upload, "again");
    await Promise.race([pause(waitMs), new Promise((resolve) => addEventListener("online", resolve, { once: true }))]);
  }
}

function reasonOf(status, answer) {
  const text = answer?.error ?? "";
  if (status === 401 || (status === 403 && SIGN_IN)) return WORDS["upload.signed_out"];
  if (status === 413) return say("upload.too_large", { size: document.body.dataset.maxSize });
  if (status === 400 && text.startsWith("photo:")) return `${WORDS["upload.not_photo"]} (${text.slice(6).trim()})`;
  return `${WORDS["upload.refused"]} (${text || status})`;
}

// Resolves to {status, answer}; status 0 without an answer. fetch tells nothing of how much was sent.
function post(upload) {
  const form = new FormData();
  form.append("prompt", upload.wishes.prompt);
  form.append("seconds", upload.wishes.seconds);
  if (upload.groupSent !== null) form.append("group", upload.groupSent);
  form.append("photo", upload.file, upload.file.name);
  const bar = upload.row.querySelector("progress");
  return new Promise((resolve) => {
    const request = new XMLHttpRequest();
    let timer;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => request.abort(), STALLED_MS);
    };
    request.upload.onprogress = ({ loaded, total }) => {
      alive();
      bar.value = Math.max(bar.value, Math.min(99, (100 * loaded) / total));
      if (loaded === total) setUpload(upload, "checking");
    };
    request.onloadend = () => {
      clearTimeout(timer);
      let answer = null;
      try {
        answer = JSON.parse(request.responseText);
      } catch {
        // A proxy's page, or nothing.
      }
      const isOurs = answer !== null && typeof answer === "object" && "success" in answer;
      const isProxys = !isOurs && (request.status < 400 || [502, 503, 504].includes(request.status)); // the server is away
      resolve({ status: isProxys ? 0 : request.status, answer });
    };
    request.open("POST", "api/tasks");
    request.setRequestHeader("Idempotency-Key", upload.key);
    request.send(form);
    alive();
  });
}

function complain(text, element) {
  const box = byId("composer-error");
  box.textContent = text;
  box.hidden = false;
  element.focus();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const ready = uploads.filter(({ state }) => state === "ready");
  const seconds = byId("seconds");
  if (ready.length === 0) return complain(WORDS["form.no_photos"], byId("photos"));
  if (!seconds.checkValidity()) return complain(seconds.validationMessage, seconds);
  byId("composer-error").hidden = true;
  const wishes = { prompt: byId("prompt").value.trim(), seconds: seconds.value };
  const batch = { group: null, leader: null, added: 0 };
  for (const upload of ready) {
    Object.assign(upload, { wishes, batch, key: newKey(), groupSent: null });
    setUpload(upload, "waits");
  }
  showChosen();
  pump();
});

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("composer").requestSubmit();
});

byId("photos").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = ""; // so that the same file may be chosen again
});

byId("uploads").addEventListener("click", (event) => {
  const button = event.target.closest("[data-upload]");
  const upload = button && uploads.find(({ row }) => row.contains(button));
  if (!upload) return;
  if (button.dataset.upload === "remove") {
    drop(upload);
    byId("photos").focus({ preventScroll: true });
    return;
  }
  upload.row.querySelector("progress").value = 0;
  setUpload(upload, "waits");
  pump();
});

// Photos may be dropped anywhere, folders of them, too.
const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
let depth = 0;
const setDragging = (is) => document.documentElement.toggleAttribute("data-dragging", is);

addEventListener("dragenter", (event) => {
  if (!hasFiles(event)) return;
  depth += 1;
  setDragging(true);
});
addEventListener("dragleave", (event) => {
  if (hasFiles(event) && --depth <= 0) {
    depth = 0;
    setDragging(false);
  }
});
addEventListener("dragover", (event) => {
  if (hasFiles(event)) event.preventDefault();
});
addEventListener("drop", async (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth = 0;
  setDragging(false);
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.());
  const folders = entries.filter((entry) => entry?.isDirectory); // before any wait: afterwards the items are gone
  const files = [...event.dataTransfer.files].filter(({ name }) => !folders.some((folder) => folder.name === name));
  add(files);
  for (const folder of folders) add(await filesIn(folder));
  byId("drop").scrollIntoView({ block: "nearest" });
});

async function filesIn(folder) {
  const found = [];
  const waiting = [folder];
  while (waiting.length && found.length < MAX_FILES) {
    const entry = waiting.shift();
    try {
      if (entry.isFile) found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
      else {
        const reader = entry.createReader();
        let some;
        do {
          some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
          waiting.push(...some);
        } while (some.length);
      }
    } catch {
      // One that cannot be read is left out.
    }
  }
  return found.filter(({ name, type }) => type.startsWith("image/") || /\.hei[cf]$/i.test(name));
}

addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) add(event.clipboardData.files);
});

addEventListener("beforeunload", (event) => {
  if (uploadsUnderWay()) event.preventDefault();
});

// ------------------------------------------------------------------ beginning

tick();
setInterval(() => document.hidden || tick(), 1000);
setInterval(() => document.hidden || wasLost || refreshSummary(), SUMMARY_EVERY_MS);
connect();
