// Conversations in the browser (IndexedDB). What the list shows is kept apart from what was said, so that the list doesn't
// read every document of every conversation.

const NAME = "lt-gguf";

let opening = null;
const memory = { list: new Map(), content: new Map() };  // where the browser keeps nothing, as in some private windows

function open() {
  opening ??= new Promise((resolve) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("list", { keyPath: "id" });
      asked.result.createObjectStore("content", { keyPath: "id" });
    };
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(null);
  });
  return opening;
}

function result(asked) {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

/** All conversations, the last one used first: {id, title, named, updated}. */
export async function list() {
  const db = await open();
  const rows = db ? await result(db.transaction("list").objectStore("list").getAll()) : [...memory.list.values()];
  return rows.sort((a, b) => b.updated - a.updated);
}

export async function load(id) {
  const db = await open();
  if (!db) return memory.content.has(id) ? structuredClone({ ...memory.list.get(id), ...memory.content.get(id) }) : null;
  const transaction = db.transaction(["list", "content"]);
  const [row, content] = await Promise.all([
    result(transaction.objectStore("list").get(id)), result(transaction.objectStore("content").get(id)),
  ]);
  return row && content ? { ...row, ...content } : null;
}

export async function save(session) {
  const row = { id: session.id, title: session.title, named: session.named, updated: session.updated };
  const content = { id: session.id, messages: session.messages, draft: session.draft };
  const db = await open();
  if (!db) {
    memory.list.set(row.id, row);
    memory.content.set(row.id, structuredClone(content));
    return;
  }
  const transaction = db.transaction(["list", "content"], "readwrite");
  transaction.objectStore("list").put(row);
  await result(transaction.objectStore("content").put(content));
}

export async function remove(id) {
  const db = await open();
  if (!db) {
    memory.list.delete(id);
    memory.content.delete(id);
    return;
  }
  const transaction = db.transaction(["list", "content"], "readwrite");
  transaction.objectStore("list").delete(id);
  await result(transaction.objectStore("content").delete(id));
}
