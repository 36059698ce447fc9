/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the hooked functions call first, in place of ftrace's no-op at their
 * start.  On the stack are the address behind that call, inside the hooked
 * function, and above it the address that the function itself would return to.
 *
 * The order is the second argument of all of them.  Every other order than that
 * of a huge page goes on at once: call, endbr64, cmp, je and ret, five
 * instructions where a no-op was, and no register but the flags is touched.
 *
 * Nothing here calls the hooked function: whoever sleeps in there has no return
 * address of this module on its stack, so the module can go.
 */
#include <linux/linkage.h>
#include <asm/asm-offsets.h>
#include <asm/ibt.h>
#include <asm/nospec-branch.h>
#include <asm/page_types.h>
#include <asm/percpu.h>
#include <asm/pgtable_types.h>
#include <asm/unwind_hints.h>

.macro TRAMPOLINE name:req handler:req
SYM_START(\name, SYM_L_GLOBAL, SYM_F_ALIGN)
	ENDBR
	cmpl	$(PMD_SHIFT - PAGE_SHIFT), %esi
	je	.Lhuge\@
	RET

.Lhuge\@:
	pushq	%rbp
	movq	%rsp, %rbp
	pushq	%rdi
	pushq	%rsi
	pushq	%rdx
	pushq	%rcx
	pushq	%r8
	pushq	%r9
	CALL_DEPTH_ACCOUNT
	call	\handler
	popq	%r9
	popq	%r8
	popq	%rcx
	popq	%rdx
	popq	%rsi
	popq	%rdi
	popq	%rbp
	testq	%rax, %rax
	jnz	.Lplaced\@
	RET

.Lplaced\@:
	/* Past the hooked function, to whoever called it. */
	addq	$8, %rsp
	UNWIND_HINT_FUNC
	RET
SYM_FUNC_END(\name)
.endm

TRAMPOLINE gemini_trampoline_policy gemini_place_policy
TRAMPOLINE gemini_trampoline_vma gemini_place_vma
TRAMPOLINE gemini_trampoline_node gemini_place_node
