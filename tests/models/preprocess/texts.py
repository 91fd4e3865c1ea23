"""Texts in many languages, and others that tokenizers trip over."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_SENTENCES = (
    "My parcel has not arrived, and the tracking page shows nothing.",
    "Waar blijft mijn bestelling? Ik wacht al drie weken!",
    "Größe, Straße und Fußgängerübergänge – „in Anführungszeichen“ …",
    "L'été dernier, j'ai commandé une œuvre à 12,50 €.",
    "¿Cuándo llegará el pedido? ¡Mañana por la mañana!",
    "Não consigo iniciar sessão na minha conta, a ligação falha.",
    "Zażółć gęślą jaźń, proszę o zwrot pieniędzy.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Pijamalı hasta yağız şoföre çabucak güvendi. İSTANBUL ılık",
    "Tôi muốn đổi địa chỉ giao hàng; tiếng Việt có dấu.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Жебракують філософи при ґанку церкви в Гадячі.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "أين طلبي؟ لم يصل حتى الآن، ورقم التتبع لا يعمل.",
    "כשהמנוע מתחמם, נשמע רעש מוזר.",
    "سفارش من هنوز نرسیده است؛ می‌خواهم پولم را پس بگیرم.",
    "मेरा ऑर्डर अभी तक नहीं आया है। क्या आप मदद करेंगे?",
    "আমার অর্ডার এখনও আসেনি।",
    "என் ஆர்டர் இன்னும் வரவில்லை.",
    "ฉันต้องการคืนสินค้าและขอเงินคืน น้ำดื่ม",
    "请问这个产品什么时候发货?我想知道订单的状态。",
    "注文した商品がまだ届いていません。カタカナとﾊﾝｶｸ。",
    "주문한 상품이 아직 도착하지 않았습니다.",
    "\u1112\u1161\u11ab\u1100\u1173\u11af and e\u0301 o\u0308 decomposed",
    "გამარჯობა, სად არის ჩემი შეკვეთა?",
    "Բարև, որտե՞ղ է իմ պատվերը։",
    "ሰላም፣ ትዕዛዜ የት ነው?",
    "🙂🚀👩‍👩‍👧❤️ 5 stars, would buy AGAIN!!! https://example.com/a?b=c#d",
    "ﬁ ﬂ ① ② ½ ℡ ㌔ ＡＢＣ Ⅳ ªº™ \u01c5",
    "control \x01\x07\x1b characters \x7f\x8f\x9f here",
    "joiners\u200ca\u200db \ufeffmark\u200b \u2028line \xa0 \u3000 wide",
    "tabs\tand\nnew lines\r\n   and    spaces  ",
    "<s> </s> <mask> <pad> <unk> ＜s＞ ▁ _ [SEP] ##x",
    "\U0001f23b \U0001f202 \U00020000\U0002a6d6 \u0378 \ue000 unknown",
    "1597,0,341\t2.53333333333\t...1.1.1 33333 aaaaaa $$$$ !!!!!! ......",
    "def f(x): return {'a': [1, 2.5e-3], \"b\": None}  # code",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "ALL CAPITALS and MiXeD CaSe, O'Neill's co-operation; e-mail@example.org",
    "x" * 700,
    "中文" * 600,
    "The refund was promised for last week. " * 120,
)
TEXTS = tuple(_SENTENCES)


def mixtures(count: int) -> Iterator[str]:
    """Yield texts whose parts come from several of the sentences, cut at any character."""
    rng = np.random.default_rng(11)
    for _ in range(count):
        parts = []
        for place in rng.integers(0, len(_SENTENCES), rng.integers(1, 6)):
            sentence = _SENTENCES[place]
            begin, end = sorted(rng.integers(0, min(len(sentence), 80) + 1, 2))
            parts.append(sentence[begin:end])
        text = rng.choice(["", " ", "\n"]).join(parts)
        if text.strip():
            yield text
