// The key: what a server that asks for one is shown with every request.
//
// It stays in this tab: session storage is no other tab's, and is gone with it.

const NAME = "earshot.key";

export const currentKey = () => sessionStorage.getItem(NAME) ?? "";

export function setKey(key) {
  sessionStorage.setItem(NAME, key.trim());
}

export function authorization() {
  const key = currentKey();
  return key ? { Authorization: `Bearer ${key}` } : {};
}
