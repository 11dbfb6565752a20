// What test_show.py does with the contact sheet of hostile shards; the body of an async function.
document.querySelector("#tag").value = document.querySelector("#tags option").value;
document.querySelector("#tag").dispatchEvent(new Event("input", { bubbles: true }));
for (const name of ["pointermove", "pointerover"])
  for (const e of document.querySelectorAll(".photo, .chip, rect")) e.dispatchEvent(new PointerEvent(name, { bubbles: true }));
document.querySelector(".frame").click();
await wait(100);
return { hacked: String(window.hacked), images: document.images.length, scripts: document.scripts.length,
         keys: [...document.querySelectorAll(".sheet .key")].map((k) => k.textContent),
         text: document.querySelector(".texts li").textContent, tag: document.querySelector("rect").dataset.tag };
