// Conversations in IndexedDB. Messages form a tree: an answer has the question as its parent, and a message that was
// edited or generated again is one more child. So each tab only adds records, or changes one that it has made itself.

const NAME = "moetier";
const channel = new BroadcastChannel(NAME);

/** Return a promise of a request's result. */
function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Return a new id: 128 random bits. (crypto.randomUUID exists only over TLS and on this machine.) */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Store {
  /** Open the database. Rejects if the browser lets the page store nothing. */
  static async open() {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    const database = await done(request);
    database.onversionchange = () => database.close(); // a newer page in another tab may change the database
    return new Store(database);
  }

  constructor(database) {
    this.database = database;
  }

  /** Call `changed` with a conversation's id when another tab has changed it. */
  set onchange(changed) {
    channel.onmessage = (event) => changed(event.data);
  }

  /** Return all conversations, the last used one first. */
  async conversations() {
    const all = await done(this.#stores("readonly").conversations.getAll());
    return all.sort((one, other) => other.updated - one.updated);
  }

  /** Return a conversation, or undefined. */
  conversation(id) {
    return done(this.#stores("readonly").conversations.get(id));
  }

  /** Return all messages of a conversation, the oldest first. */
  async messages(id) {
    const all = await done(this.#stores("readonly").messages.index("conversation").getAll(id));
    return all.sort((one, other) => one.created - other.created || (one.id < other.id ? -1 : 1));
  }

  /** Add a conversation with its messages. */
  async add(conversation, messages = []) {
    const stores = this.#stores("readwrite");
    stores.conversations.put(conversation);
    for (const message of messages) stores.messages.put(message);
    await this.#committed(stores, conversation.id);
  }

  /** Change fields of a conversation, unless it was removed. Other tabs may have changed other fields. */
  async update(id, changes) {
    const stores = this.#stores("readwrite");
    const conversation = await done(stores.conversations.get(id));
    if (conversation) stores.conversations.put({ ...conversation, ...changes });
    await this.#committed(stores, id);
  }

  /** Add or replace a message, unless its conversation was removed. */
  async save(message) {
    const stores = this.#stores("readwrite");
    if (await done(stores.conversations.getKey(message.conversation))) stores.messages.put(message);
    await this.#committed(stores, message.conversation);
  }

  /** Remove a conversation with its messages. */
  async remove(id) {
    const stores = this.#stores("readwrite");
    stores.conversations.delete(id);
    for (const key of await done(stores.messages.index("conversation").getAllKeys(id))) stores.messages.delete(key);
    await this.#committed(stores, id);
  }

  #stores(mode) {
    const transaction = this.database.transaction(["conversations", "messages"], mode);
    return {
      transaction,
      conversations: transaction.objectStore("conversations"),
      messages: transaction.objectStore("messages"),
    };
  }

  #committed({ transaction }, id) {
    return new Promise((resolve, reject) => {
      transaction.oncomplete = () => {
        channel.postMessage(id);
        resolve();
      };
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  }
}
