"""A small bilingual collection of the project's own, with forty questions: (file, text) and
(question, file, what the right chunk holds)."""
NOTES = {
    "garden.md": """# Garden

## Watering

Tomatoes want water at the root, early in the morning. Wet leaves invite blight.

## Compost

Turn the heap every second week. Egg shells take a year to rot; citrus peel is better left out.

| month | sow |
|---|---|
| March | peas, broad beans |
| May | courgettes |
""",
    "boiler.md": """# Boiler

## Pressure

The gauge should stand between 1.2 and 1.5 bar. Below 0.8 bar the burner locks itself.

## Error codes

- F28: no gas, check the yellow tap
- F75: the pump does not raise the pressure

```sh
# reset the controller
boilerctl --reset --wait 30
```
""",
    "bike.md": """# Bicycle

The chain is changed after 3,000 kilometres. Tyre pressure: 4.5 bar in front, 5 bar at the rear.

The spare key hangs behind the calendar in the kitchen.
""",
    "office.md": """# Office

## Printer

Printer jams are cleared from the back, never from the front tray. Toner is kept in cupboard 12.

## Network

The guest password changes on the first Monday of each month. Ask Ingrid for it.
""",
    "bread.md": """# Rye bread

Feed the sourdough the evening before. Bake for 55 minutes at 220 degrees, then 10 minutes without
the tin. The loaf is done when it sounds hollow.
""",
    "cat.md": """# Our cat

Mimi gets her heart tablet at eight, hidden in tuna. The vet is Dr. Okafor, Mill Lane 4. Her
insurance number is KT-55012.
""",
    "茶.md": """# 泡茶

## 绿茶

绿茶用八十度的水，泡两分钟就要倒出来，否则发苦。

## 普洱

普洱先用沸水洗一遍，第一泡倒掉。存放要避光、防潮。
""",
    "搬家.md": """# 搬家清单

一、提前两周

联系物业预约电梯，把宽带迁到新地址。

二、当天

钥匙交给二楼的陈阿姨。电表读数要拍照。
""",
    "相机.md": """# 相机

拍星空时光圈开到最大，快门不超过二十秒。备用电池放在灰色的小包里。

镜头进灰不要用嘴吹，用气吹。
""",
    "医院.md": """第一章 挂号

复诊可以在手机上挂号，早上七点放号。儿科在三号楼的五层。

第二章 取药

取药窗口在一楼大厅的东侧，中午不休息。
""",
    "路由器.md": """# 路由器

指示灯变红表示断网，先重启光猫，再重启路由器。管理地址是 192.168.8.1，默认密码写在机身底部。

访客网络每天夜里十二点自动关闭。
""",
    "菜谱.md": """# 红烧肉

五花肉切块，冷水下锅焯三分钟。冰糖炒出糖色，再下肉。小火炖一个小时，最后大火收汁。
""",
}
QUESTIONS = [
    ("When should tomatoes be watered?", "garden.md", "early in the morning"),
    ("What invites blight?", "garden.md", "Wet leaves"),
    ("How often is the compost heap turned?", "garden.md", "every second week"),
    ("How long do egg shells take to rot?", "garden.md", "a year"),
    ("Which beans are sown in March?", "garden.md", "broad beans"),
    ("Between which values should the gauge stand?", "boiler.md", "1.2 and 1.5 bar"),
    ("What does F28 mean?", "boiler.md", "no gas"),
    ("Which command resets the controller?", "boiler.md", "boilerctl --reset"),
    ("When does the burner lock itself?", "boiler.md", "0.8 bar"),
    ("After how many kilometres is the chain changed?", "bike.md", "3,000"),
    ("What is the tyre pressure at the rear?", "bike.md", "5 bar"),
    ("Where is the spare key?", "bike.md", "behind the calendar"),
    ("How are printer jams cleared?", "office.md", "from the back"),
    ("Where is the toner kept?", "office.md", "cupboard 12"),
    ("When does the guest password change?", "office.md", "first Monday"),
    ("How long does the rye bread bake?", "bread.md", "55 minutes"),
    ("When is the sourdough fed?", "bread.md", "evening before"),
    ("When does Mimi get her tablet?", "cat.md", "at eight"),
    ("Who is the vet?", "cat.md", "Okafor"),
    ("What is the insurance number of the cat?", "cat.md", "KT-55012"),
    ("绿茶用多少度的水？", "茶.md", "八十度"),
    ("绿茶泡几分钟？", "茶.md", "两分钟"),
    ("普洱第一泡怎么办？", "茶.md", "倒掉"),
    ("普洱怎么存放？", "茶.md", "避光"),
    ("搬家前联系谁预约电梯？", "搬家.md", "物业"),
    ("钥匙交给谁？", "搬家.md", "陈阿姨"),
    ("电表读数要怎么样？", "搬家.md", "拍照"),
    ("拍星空快门不超过多少秒？", "相机.md", "二十秒"),
    ("备用电池放在哪里？", "相机.md", "灰色的小包"),
    ("镜头进灰怎么处理？", "相机.md", "气吹"),
    ("手机挂号几点放号？", "医院.md", "七点"),
    ("儿科在几号楼？", "医院.md", "三号楼"),
    ("取药窗口在哪里？", "医院.md", "东侧"),
    ("指示灯变红表示什么？", "路由器.md", "断网"),
    ("路由器的管理地址是什么？", "路由器.md", "192.168.8.1"),
    ("访客网络什么时候关闭？", "路由器.md", "十二点"),
    ("五花肉焯多久？", "菜谱.md", "三分钟"),
    ("红烧肉小火炖多长时间？", "菜谱.md", "一个小时"),
    ("红烧肉用什么炒糖色？", "菜谱.md", "冰糖"),
    ("默认密码写在哪里？", "路由器.md", "机身底部"),
]
STRANGE = ["How do I renew a passport?", "Who won the chess tournament in Reykjavik?",
           "What does quantum entanglement explain?", "Is the swimming pool heated in winter?",
           "火星上有没有生命？", "如何申请护照？", "股票昨天收盘价是多少？", "钢琴怎么调音？"]
